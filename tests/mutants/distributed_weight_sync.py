"""Wrong answers to chapter 9's exercises on weights, each with the sentence naming its mistake."""

from rlhf_course.coursework.mutants import Mutant


def mutants(exercise, *rows):
    """Mutants of one exercise, from (name, says, edits or body)."""
    made = []
    for name, says, change in rows:
        kind = "body" if isinstance(change, str) else "edits"
        made.append(Mutant(exercise, name, says=says, **{kind: change}))
    return made


BUFFERS = "[torch.empty_like(shard) for _ in range(group.size())]"
TOO_FEW = 'f"{len(flat)} numbers on all ranks do not fill the shape {shape}")'
CUT = "return flat[:count].view(shape)"

GATHER = mutants(
    "distributed.weight_sync.gather_zero3_parameters",
    (
        "group ignored",
        "You use this rank's piece alone. Those of the others have to be gathered (all_gather).",
        [("if group is not None:", "if False:")],
    ),
    (
        "one buffer for all",
        "`[buffer] * n` is n times the same tensor: every piece ends up as the last rank's. Make a "
        "buffer for each rank.",
        [(BUFFERS, "[torch.empty_like(shard)] * group.size()")],
    ),
    (
        "summed up",
        "You add the pieces up. They are different parts of the parameter: put them one behind the "
        "other.",
        [("torch.cat(pieces)", "sum(pieces)")],
    ),
    (
        "last rank first",
        "The pieces are in the wrong order: rank 0 holds the beginning.",
        [("torch.cat(pieces)", "torch.cat(pieces[::-1])")],
    ),
    (
        "own piece first",
        "You put your own piece first, so every rank gets another parameter. The order is that of "
        "the ranks.",
        [
            (
                "torch.cat(pieces)",
                "torch.cat(\n        pieces if group is None else\n"
                "        [shard, *pieces[: group.rank()], *pieces[group.rank() + 1 :]]\n    )",
            )
        ],
    ),
    (
        "dealt out in turn",
        "You take a number from each rank in turn. Each rank holds one piece without gaps.",
        [("torch.cat(pieces)", "torch.stack(pieces, dim=1).flatten()")],
    ),
    (
        "padding kept",
        "The padding behind the last number is still there. Cut it off before you give the shape.",
        [(CUT, "return flat.view(shape)")],
    ),
    (
        "padding at the front",
        "You cut off the beginning. The padding stands at the end.",
        [(CUT, "return flat[len(flat) - count :].view(shape)")],
    ),
    (
        "padding of every piece",
        "You take an equal share of the numbers from each piece. All pieces but the last are full, "
        "and the padding stands behind the last number.",
        [
            (
                "torch.cat(pieces), ",
                "torch.cat([p[: prod(shape) // len(pieces)] for p in pieces]), ",
            )
        ],
    ),
    (
        "flat",
        "You return the numbers in a row. They are asked for in the parameter's shape.",
        [(CUT, "return flat[:count]")],
    ),
    (
        "transposed",
        "You fill the shape column by column. It is laid out row by row.",
        [(CUT, "return flat[:count].view(shape[::-1]).permute(*range(len(shape))[::-1])")],
    ),
    (
        "on the leading rank only",
        "Only rank 0 gets the whole parameter. Every rank has to return it.",
        [
            (
                "    flat, count",
                "    if group is not None and group.rank():\n        return shard\n    flat, count",
            )
        ],
    ),
    (
        "leading rank alone calls",
        "Only rank 0 calls all_gather. It waits for ever for the others: every rank has to call.",
        [("if group is not None:", "if group is not None and group.rank() == 0:")],
    ),
    (
        "only padding, so it leaves",
        "A rank that holds nothing but padding does not take part. The others wait for it.",
        [
            (
                "pieces = [shard.clone()]\n",
                "if group is not None and group.rank() * len(shard) >= prod(shape):\n"
                "        return torch.zeros(shape, dtype=shard.dtype)\n"
                "    pieces = [shard.clone()]\n",
            )
        ],
    ),
    (
        "float32",
        "You return float32 whatever comes. The dtype is that of the shards.",
        [(CUT, "return flat[:count].view(shape).float()")],
    ),
    (
        "buffers of another dtype",
        "Your buffers have torch's default dtype. They must have that of the shard.",
        [(BUFFERS, "[torch.empty(len(shard)) for _ in range(group.size())]")],
    ),
    (
        "gradient kept",
        "Your result still belongs to the shard's graph. It is sent to another process: detach it.",
        [("shard = shard.detach().contiguous()", "shard = shard.contiguous()")],
    ),
    (
        "a view of the shard",
        "Alone you return a view of the shard. Whoever changes the result would change the model.",
        [
            (
                "    if group is not None:\n",
                "    if group is None and len(shard) >= prod(shape):\n"
                "        return shard[: prod(shape)].view(shape)\n    if group is not None:\n",
            )
        ],
    ),
    (
        "filled up with zeros",
        "Where numbers are missing you put zeros. Pieces that do not fill the shape are a mistake "
        "somewhere: raise ValueError.",
        [
            (
                "raise ValueError(" + TOO_FEW,
                "flat = torch.cat([flat, flat.new_zeros(count - len(flat))])",
            )
        ],
    ),
)

SYNC = mutants(
    "distributed.weight_sync.sync_weights",
    (
        "only the leading rank gathers",
        "A rank without a channel gathers nothing. The leading one then waits for its shards for "
        "ever.",
        [
            (
                "    count = 0\n",
                "    count = 0\n    if channel is None:\n"
                "        return sum(1 for _ in parameters)\n",
            )
        ],
    ),
    (
        "others leave",
        "A rank without a channel returns at once. It has to gather with the others, and to count.",
        [("    count = 0\n", "    count = 0\n    if channel is None:\n        return count\n")],
    ),
    (
        "begin missing",
        "You never call begin. The engines would answer with half of the new weights.",
        [("channel.begin(version)", "pass")],
    ),
    (
        "begin too late",
        "You begin after the first parameter has been gathered. Begin before anything else.",
        """
            count = 0
            for name, gather in parameters:
                tensor = gather()
                if channel is not None:
                    if count == 0:
                        channel.begin(version)
                    channel.send(name, tensor)
                count += 1
            if channel is not None:
                channel.finish(version)
            return count
        """,
    ),
    (
        "begin and finish for each",
        "You begin and finish for every parameter. Between two of them the engines would answer "
        "with a model that is half new.",
        """
            count = 0
            for name, gather in parameters:
                tensor = gather()
                if channel is not None:
                    channel.begin(version)
                    channel.send(name, tensor)
                    channel.finish(version)
                count += 1
            return count
        """,
    ),
    (
        "finish missing",
        "You never call finish. The engines go on refusing for ever.",
        [("channel.finish(version)", "pass")],
    ),
    (
        "finish in finally",
        "You finish even when something has failed. Then the engines answer with half of the new "
        "weights: a failure must not reach finish.",
        """
            count = 0
            if channel is not None:
                channel.begin(version)
            try:
                for name, gather in parameters:
                    tensor = gather()
                    if channel is not None:
                        channel.send(name, tensor)
                    count += 1
            finally:
                if channel is not None:
                    channel.finish(version)
            return count
        """,
    ),
    (
        "failures swallowed",
        "You skip a parameter that fails. The engine would have a mixture of old and new weights, "
        "and nobody would know: let the error through.",
        """
            count = 0
            if channel is not None:
                channel.begin(version)
            for name, gather in parameters:
                try:
                    tensor = gather()
                    if channel is not None:
                        channel.send(name, tensor)
                except Exception:
                    continue
                count += 1
            if channel is not None:
                channel.finish(version)
            return count
        """,
    ),
    (
        "all gathered first",
        "You gather all parameters before you send the first. The whole model then has to fit into "
        "one rank's memory, and what was gathered may be freed already.",
        """
            if channel is not None:
                channel.begin(version)
            whole = [(name, gather()) for name, gather in parameters]
            if channel is not None:
                for name, tensor in whole:
                    channel.send(name, tensor)
                channel.finish(version)
            return len(whole)
        """,
    ),
    (
        "one behind",
        "You send each parameter after the next one has been gathered. Its memory is used again by "
        "then.",
        """
            count, held = 0, None
            if channel is not None:
                channel.begin(version)
            for name, gather in parameters:
                tensor = gather()
                if channel is not None and held is not None:
                    channel.send(*held)
                held = name, tensor
                count += 1
            if channel is not None:
                if held is not None:
                    channel.send(*held)
                channel.finish(version)
            return count
        """,
    ),
    (
        "gathered twice",
        "The leading rank gathers each parameter twice, the others once. They would be out of step "
        "from then on.",
        [("channel.send(name, tensor)", "channel.send(name, gather())")],
    ),
    (
        "gone through twice",
        "You go through the parameters once to count them; a generator is empty after that.",
        [
            ("count = 0", "count = len(list(parameters))"),
            ("        count += 1\n", ""),
        ],
    ),
    (
        "the function is sent",
        "You send the function that gathers. Call it, and send what it returns.",
        [("channel.send(name, tensor)", "channel.send(name, gather)")],
    ),
    (
        "sorted",
        "You sort the parameters by name. All ranks must keep the order in which they come, also "
        "those that do not sort.",
        [("in parameters:", "in sorted(parameters, key=lambda pair: pair[0]):")],
    ),
    (
        "version of begin at finish",
        "You finish with the number before. The engines are to call their weights `version`.",
        [("channel.finish(version)", "channel.finish(version - 1)")],
    ),
    (
        "version counted up",
        "You count the version up. It is given as it is to be told.",
        [
            ("channel.begin(version)", "channel.begin(version + 1)"),
            ("channel.finish(version)", "channel.finish(version + 1)"),
        ],
    ),
    (
        "others count nothing",
        "A rank without a channel returns 0. Every rank returns how many parameters there were.",
        [("return count", "return count if channel is not None else 0")],
    ),
    (
        "nothing returned",
        "You return nothing. The number of parameters is asked for.",
        [("return count", "return None")],
    ),
    (
        "first left out",
        "The first parameter is gathered and not sent.",
        [
            (
                "        if channel is not None:\n            channel.send",
                "        if channel is not None and count:\n            channel.send",
            )
        ],
    ),
    (
        "float32",
        "You send everything as float32. The engine expects the parameter's own dtype.",
        [("channel.send(name, tensor)", "channel.send(name, tensor.float())")],
    ),
)

MUTANTS = [*GATHER, *SYNC]
