"""Runs on the answer's side what the tests of chapter 2 cannot see from theirs."""

import copy


def packed_from(namespace, examples, context, pad_id):
    """(what `pack` returns, the examples as it left them)."""
    own = copy.deepcopy(examples)
    packed = namespace.pack(own, context, pad_id)
    return tuple(packed), own
