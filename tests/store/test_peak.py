"""What a group of layers needed while it ran is gone when the next group runs: the peak of a prefill is one group's."""

import weakref

from kvstack import Evict, KVStack
from tests import tiny


def test_the_whole_text_of_a_layer_is_let_go_when_its_group_is_settled():
    model, stack, told = tiny.model(), KVStack([Evict(0.2, "keydiff", layers=1)], sinks=2, window=4), []

    def note(*_):
        (data,) = stack.batch.cohorts[0].stores[0].raw[0].buffers[0].tensors
        told.append(weakref.ref(data))

    def look(*_):
        told.append(told[0]() is None)

    first = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(note)
    last = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(look)
    model(tiny.tokens(1, 100), past_key_values=stack)
    first.remove()
    last.remove()
    assert told[1]
