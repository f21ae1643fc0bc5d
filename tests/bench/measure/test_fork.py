"""Questions on forks. What is measured of time is never asserted."""

from tests.bench.commands import invoke


def test_a_fork_adds_no_bytes_and_a_question_few(bench):
    stacks = ("quant:4@block=256", "quant:4@block=16")
    shared, sealed = bench("fork", "--rounds", "1", "--contexts", "2000", stacks=stacks)
    assert [row["nbytes_forked"] for row in (shared, sealed)] == [0, 0]
    assert 0 < shared["nbytes_asked"] < shared["nbytes"] / 2
    # a block of 16 is full, and compressing it copies what is compressed
    assert sealed["nbytes_asked"] > shared["nbytes_asked"]
    assert all(row[f"ms_{way}"] > 0 for row in (shared, sealed) for way in ("again", "copy", "fork"))


def test_the_table_names_all_ways():
    told = invoke("fork", "--rounds", "1", "--contexts", "200", "--stack", "quant:4")
    assert all(words in told for words in ("read again", "copy", "fork", "question of 32 tokens"))
