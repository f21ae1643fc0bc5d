"""Everything that `Cache` and `DynamicCache` offer works on a stack as it does there, or is refused with the fix."""

import copy
import inspect
import pickle

import pytest
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from kvstack import BindError, CommonKV, Evict, KVStack, KVStackError, Quant, UseError
from tests import tiny

REFUSED = {
    "offload": (0,),
    "prefetch": (0,),
    "update_indexer": (torch.zeros(1, 1, 4), 0),
    "update_conv_state": (torch.zeros(1, 4, 4), 0),
    "update_recurrent_state": (torch.zeros(1, 4, 4), 0),
    "get_conv_state": (0,),
    "get_recurrent_state": (0,),
    "has_previous_state": (),
}
"""Methods that a model of attention layers alone has no use for: a ValueError, as on a DynamicCache."""

ASKED = {
    "get_seq_length": [(), (1,), (3,)],
    "get_query_offset": [(), (1,)],
    "get_mask_sizes": [(1, 0), (5, 3)],
    "get_max_length": [(), (0,), (99,)],
    "is_recording_past": [(0,), (3,)],
    "__len__": [()],
    "__iter__": [()],
}
"""Methods that tell something, and arguments for them."""

CHANGING = {
    "crop": [(0,), (-1,), (-7,)],
    "reorder_cache": [(torch.tensor([1, 0, 0]),)],
    "batch_repeat_interleave": [(2,)],
    "batch_select_indices": [(torch.tensor([2, 0]),)],
    "reset": [()],
    "activate_past_recording": [()],
    "early_initialization": [(3, 2, 16, torch.float32, torch.device("cpu"))],
}
"""Methods that change the cache; `activate_past_recording` on an empty one."""

ELSEWHERE = {"update", "__init__", "__repr__", "__str__"}
"""`update` is what all other tests are about."""

PROPERTIES = {"is_compileable", "is_croppable", "is_dummy", "is_initialized", "is_linear", "is_sliding"}
NOT_ALIKE = {"batch_size"}  # transformers' own layers do not tell it


def filled(cache, rows=3, length=9):
    tiny.model()(tiny.tokens(rows, length), past_key_values=cache)
    return cache


def both():
    """An empty stack and a DynamicCache, neither used yet."""
    return KVStack(model=tiny.model()), DynamicCache(config=tiny.model().config)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list) or inspect.isgenerator(one):
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def members():
    own = {name for kind in (DynamicCache, Cache) for name in vars(kind)}
    return {name for name in own if not name.startswith("_") or name in {"__len__", "__iter__", "__init__", "__repr__"}}


def test_every_member_of_transformers_is_known_here():
    """A new one has to be looked at before it is said to work."""
    assert members() == {*REFUSED, *ASKED, *CHANGING, *PROPERTIES, *NOT_ALIKE, *ELSEWHERE} - {"__str__"}


@pytest.mark.parametrize("name", [*ASKED, *sorted(PROPERTIES)])
def test_it_tells_what_a_dynamic_cache_tells(name):
    for prepare in (lambda cache: cache, filled):
        stack, dense = map(prepare, both())
        for arguments in ASKED.get(name, [None]):
            found, expected = (
                getattr(cache, name) if arguments is None else getattr(cache, name)(*arguments)
                for cache in (stack, dense)
            )
            assert same(found, expected), (name, arguments)


@pytest.mark.parametrize("name", CHANGING)
def test_it_changes_as_a_dynamic_cache_changes(name):
    for arguments in CHANGING[name]:
        stack, dense = both()
        if name not in ("activate_past_recording", "early_initialization"):
            filled(stack), filled(dense)
        for cache in (stack, dense):
            assert getattr(cache, name)(*arguments) is None
        rows = {"batch_repeat_interleave": 6, "batch_select_indices": 2}.get(name, 3)
        logits = [tiny.model()(tiny.tokens(rows, 4, 1), past_key_values=cache).logits for cache in (stack, dense)]
        assert torch.equal(*logits), (name, arguments)
        assert same(iter(stack), iter(dense))


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_a_dynamic_cache_refuses(name):
    for prepare in (lambda cache: cache, filled):
        stack, dense = map(prepare, both())
        with pytest.raises(ValueError, match=r"\w"):
            getattr(stack, name)(*REFUSED[name])
        if name not in ("offload", "prefetch"):
            with pytest.raises(ValueError, match=r"\w"):
                getattr(dense, name)(*REFUSED[name])


# ---- layers


def test_a_layer_tells_what_a_dynamic_layer_tells():
    stack, dense = map(filled, both())
    for one, other in zip(stack.layers, dense.layers, strict=True):
        assert type(other) is DynamicLayer
        for name in ("is_initialized", "is_croppable", "is_sliding", "is_compileable"):
            assert getattr(one, name) == getattr(other, name)
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
        assert (one.get_seq_length(), one.get_mask_sizes(2)) == (other.get_seq_length(), other.get_mask_sizes(2))


LAYER_METHODS = {
    "update": (None, None),
    "reset": (),
    "crop": (-1,),
    "reorder_cache": (None,),
    "batch_repeat_interleave": (2,),
    "batch_select_indices": ([0],),
    "offload": (),
    "prefetch": (),
}


@pytest.mark.parametrize("name", LAYER_METHODS)
def test_one_layer_cannot_change_alone(name):
    stack = filled(KVStack([Quant(4)], model=tiny.model()))
    with pytest.raises(UseError, match=rf"call {name} on the stack, not on its layer 1"):
        getattr(stack.layers[1], name)(*LAYER_METHODS[name])
    with pytest.raises(AttributeError):
        stack.layers[1].keys = torch.zeros(1)


def test_layers_of_a_compressing_stack_are_decoded():
    stack = KVStack([Quant(8), Evict(0.5)], model=tiny.model(), window=8, sinks=2)
    assert [keys for keys, *_ in stack] == [None] * 4
    filled(stack, 2, 90)
    for layer, (keys, values, window) in enumerate(stack):
        assert keys.shape == (2, 2, stack.held, 16)
        assert torch.equal(keys[1:], stack.read(layer, 1).keys)
        assert torch.equal(values, stack.layers[layer].values)
        assert window is None


def test_rows_of_unlike_lengths_are_read_one_by_one():
    ids, mask = tiny.left_padded([40, 13])
    stack = KVStack([Quant(8)], model=tiny.model(), window=8)
    tiny.model()(ids, attention_mask=mask, past_key_values=stack)
    if len({stack.read(0, row).keys.shape for row in (0, 1)}) > 1:
        keys = stack.layers[0].keys  # Llama 3.2 Vision asks every layer for keys.numel()
        assert keys.numel() > 0
        with pytest.raises(UseError, match=r"Read them one by one: KVStack\.read\(0, row\)"):
            keys.sum()


def test_sliding_layers_are_given_as_they_are():
    model = tiny.model("gemma3")
    stack, dense = KVStack(model=model), DynamicCache(config=model.config)
    for cache in (stack, dense):
        model(tiny.tokens(1, 30), past_key_values=cache)
    assert same(iter(stack), iter(dense))
    assert [stack.get_max_length(i) for i in range(4)] == [dense.get_max_length(i) for i in range(4)]


# ---- rows


@pytest.mark.parametrize(
    "rows",
    [
        [2, 0],
        (2, 0),
        torch.tensor([2, 0]),
        [-1, 0],
        [True, False, True],
        torch.tensor([True, False, True]),
        slice(0, 2),
    ],
    ids=str,
)
def test_rows_may_be_named_in_many_ways(rows):
    stack, dense = map(filled, both())
    compressing = filled(KVStack([Quant(8)], model=tiny.model(), window=2), 3, 60)
    expected = torch.stack([compressing.read(0, row).keys for row in range(3)])[
        list(rows) if isinstance(rows, tuple) else rows
    ]
    for cache in (stack, dense, compressing):
        cache.batch_select_indices(rows)
    assert same(iter(stack), iter(dense))
    assert torch.equal(compressing.layers[0].keys, expected[:, 0])


@pytest.mark.parametrize("rows", [[3], [-4], [0, 99], [], [0.5], [[0]], [True], "x", None, [False] * 3], ids=str)
@pytest.mark.parametrize("method", ["batch_select_indices", "reorder_cache"])
def test_rows_that_are_not_there(method, rows):
    stack = filled(KVStack([Quant(4)], model=tiny.model()))
    with pytest.raises(UseError, match=rf"{method}\(.*cache has 3 rows"):
        getattr(stack, method)(rows)
    assert (stack.batch_size, stack.seen) == (3, 9)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, None])
def test_repeats_that_make_no_sense(repeats):
    with pytest.raises(UseError, match="how often each row is repeated"):
        filled(KVStack([Quant(4)], model=tiny.model())).batch_repeat_interleave(repeats)


def test_an_empty_stack_is_cropped_beyond_its_beginning_as_a_dynamic_cache():
    stack, dense = map(filled, both())
    for cache in (stack, dense):
        cache.crop(-99)
    assert (stack.get_seq_length(), dense.get_seq_length()) == (0, 0)
    ids = tiny.tokens(3, 5)
    assert torch.equal(*(tiny.model()(ids, past_key_values=cache).logits for cache in (stack, dense)))


# ---- copies, and other libraries


@pytest.mark.parametrize("stages", [[], [Quant(4)], [CommonKV(), Quant(4), Evict(0.5)]], ids=str)
def test_a_copy_shares_nothing(stages):
    model, new = tiny.model(), tiny.tokens(1, 5, 1)
    stack = filled(KVStack(stages, model=model), 1, 120)
    for twin in (copy.copy(stack), copy.deepcopy(stack)):
        assert [layer.stack for layer in twin.layers] == [twin] * 4
        first = model(new, past_key_values=twin).logits
        assert (twin.seen, stack.seen) == (125, 120)
        assert torch.equal(model(new, past_key_values=copy.copy(stack)).logits, first)


def test_it_cannot_be_pickled():
    with pytest.raises(UseError, match=r"cannot be pickled. copy.deepcopy works, and save\(\) and load\(\)"):
        pickle.dumps(filled(KVStack([Quant(4)], model=tiny.model())))


def test_prefix_tuning_is_told_that_it_would_drop_the_stack():
    stack = KVStack([Quant(4)])
    assert not hasattr(stack, "max_cache_len")  # others only ask whether it is there
    with pytest.raises(KVStackError, match="PEFT's prefix tuning asks for it"):
        _ = stack.max_cache_len


def test_a_stack_in_an_encoder_decoder_cache():
    pair = EncoderDecoderCache(KVStack([Quant(4)]), DynamicCache())
    with pytest.raises(BindError, match="sits in an EncoderDecoderCache"):
        tiny.model()(tiny.tokens(1, 5), past_key_values=pair)
    pair = EncoderDecoderCache(filled(KVStack([Quant(4)], model=tiny.model())), DynamicCache())
    assert len(pair) == 4
    assert pair.get_seq_length() == 9
    for method, argument in (("crop", -1), ("batch_repeat_interleave", 2), ("batch_select_indices", [0])):
        with pytest.raises(TypeError, match=f"`{method}` is only defined for dynamic cache"):
            getattr(pair, method)(argument)
