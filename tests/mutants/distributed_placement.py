"""Wrong answers to chapter 9's placement, each with the sentence that names its mistake."""

from rlhf_course.coursework.mutants import Mutant


def mutants(exercise, *rows):
    """Mutants of one exercise, from (name, says, edits)."""
    return [Mutant(exercise, name, says, edits) for name, says, *edits in rows]


NODES = "i // gpus_per_node if gpus_per_node else 0"
LARGEST = 'max((ranks[role] for role in ranks if role != "rollout"), default=0)'
ALONE = "[{role: rank} for role, count in ranks.items() for rank in range(count)]"
COLOCATED = "[{role: i for role in roles if i < ranks[role]} for i in range(bundles)]"

PLACE = mutants(
    "distributed.placement.place",
    (
        "never colocated",
        "You never colocate. With `colocate` a bundle holds one rank of every role.",
        ("if colocate:\n        bundles", "if False:\n        bundles"),
        ("1 / len(roles) if colocate else 1.0", "1.0"),
    ),
    (
        "always colocated",
        "You colocate although it was not asked for. Separate roles have bundles of their own.",
        ("if colocate:\n        bundles", "if True:\n        bundles"),
        ("1 / len(roles) if colocate else 1.0", "1 / len(roles)"),
    ),
    (
        "shares of a whole",
        "Colocated roles take the whole of a bundle each. They have to share it.",
        ("1 / len(roles) if colocate else 1.0", "1.0"),
    ),
    (
        "shares of those who are there",
        "You divide a bundle among the roles that it holds. Shares are the same in all bundles: "
        "one of as many as there are roles.",
        ('"share": share}', '"share": 1 / len(here) if colocate else 1.0}'),
    ),
    (
        "shares of ranks",
        "You divide a bundle by the number of ranks. There, one rank of each role takes its turn.",
        ("1 / len(roles) if colocate else 1.0", "1 / sum(ranks.values()) if colocate else 1.0"),
    ),
    (
        "shared although separate",
        "Separate ranks have a bundle to themselves: their share is 1.",
        ("1 / len(roles) if colocate else 1.0", "1 / len(roles)"),
    ),
    (
        "engines last",
        "The engines come after the other roles. They are to come first: then the ranks of one fit "
        "on a node.",
        (
            'ranks = {"rollout": engines * tensor_parallel} if engines else {}\n    ranks |= {role:'
            ' count for role, count in roles.items() if role != "rollout"}',
            'ranks = {role: count for role, count in roles.items() if role != "rollout"}\n'
            '    ranks |= {"rollout": engines * tensor_parallel} if engines else {}',
        ),
    ),
    (
        "engines where they are named",
        "You keep the engines where they are named. Separate engines come first.",
        (
            'ranks = {"rollout": engines * tensor_parallel} if engines else {}\n    ranks |= {role:'
            ' count for role, count in roles.items() if role != "rollout"}',
            "ranks = {\n        role: count * tensor_parallel if role == 'rollout' else count\n"
            "        for role, count in roles.items()\n    }",
        ),
    ),
    (
        "roles sorted",
        "You sort the roles by name. They stand in the order of `roles`.",
        (
            'for role, count in roles.items() if role != "rollout"}',
            'for role, count in sorted(roles.items()) if role != "rollout"}',
        ),
    ),
    (
        "an engine is one rank",
        "You give an engine one bundle. It has `tensor_parallel` ranks.",
        ('ranks = {"rollout": engines * tensor_parallel}', 'ranks = {"rollout": engines}'),
    ),
    (
        "every role is tensor-parallel",
        "You multiply every role's ranks. Only engines have tensor-parallel ranks here.",
        ("ranks |= {role: count for role", "ranks |= {role: count * tensor_parallel for role"),
    ),
    (
        "an engine's ranks in one bundle",
        "You number the engines. Each of their ranks has a number of its own: engine e has "
        "e * tensor_parallel + 0, + 1 and so on.",
        (
            ALONE,
            ALONE.replace(
                "{role: rank}",
                "{role: rank // tensor_parallel if role == 'rollout' else rank}",
            ),
        ),
    ),
    (
        "roles take turns",
        "You deal the roles out in turn. A role's ranks stand side by side, role after role.",
        (
            ALONE,
            "[{role: rank} for rank in range(max(ranks.values()))\n                "
            "for role, count in ranks.items() if rank < count]",
        ),
    ),
    (
        "as many bundles as the smallest role",
        "You take as many bundles as the smallest role has ranks, so some ranks have none.",
        (LARGEST, LARGEST.replace("max(", "min(")),
    ),
    (
        "as many bundles as the first role",
        "You take as many bundles as the first role has ranks. It may not be the largest.",
        (LARGEST, "next((ranks[role] for role in ranks if role != 'rollout'), 0)"),
    ),
    (
        "a smaller role in every bundle",
        "You put a rank of each role into every bundle. A smaller role is in the first ones only.",
        (COLOCATED, "[{role: min(i, ranks[role] - 1) for role in roles} for i in range(bundles)]"),
    ),
    (
        "bundles for too many engines",
        "You make room for engines that do not fit. They would wait for a GPU that no other role "
        "shares: ConfigError.",
        (LARGEST, "max(ranks.values())"),
    ),
    (
        "engines that do not fit are cut",
        "You leave out the engines' ranks that do not fit. That is an error: ConfigError.",
        ("if engines * tensor_parallel > bundles:", "if False:"),
    ),
    (
        "engines are counted, not their ranks",
        "You compare the number of engines with that of the bundles. What has to fit are their "
        "ranks.",
        ("if engines * tensor_parallel > bundles:", "if engines > bundles:"),
    ),
    (
        "straddling allowed",
        "You let an engine end on another node than it began. Its ranks talk at every layer: "
        "refuse it.",
        ("if nodes[first] != nodes[last]:", "if False:"),
    ),
    (
        "divisors only",
        "You refuse every tensor-parallel size that does not divide the GPUs of a node. Only an "
        "engine that would straddle nodes is wrong.",
        (
            "if nodes[first] != nodes[last]:",
            "if gpus_per_node and gpus_per_node % tensor_parallel:",
        ),
    ),
    (
        "first engine alone",
        "You look whether the first engine fits. A later one may straddle two nodes.",
        ("for engine in range(engines):", "for engine in range(min(engines, 1)):"),
    ),
    (
        "one node",
        "Every bundle is on node 0. Bundle i is on node i // gpus_per_node.",
        (NODES, "0"),
    ),
    (
        "nodes in turn",
        "You deal the bundles out to the nodes in turn. A node is filled before the next is begun.",
        (NODES, "i % -(-len(held) // gpus_per_node) if gpus_per_node else 0"),
    ),
    (
        "nodes from 1",
        "Your nodes begin with 1. The first is node 0.",
        (NODES, "1 + i // gpus_per_node if gpus_per_node else 0"),
    ),
    (
        "division by no GPUs",
        "Without GPUs you divide by 0. All bundles are on node 0 then.",
        (NODES, "i // gpus_per_node"),
    ),
    (
        "GPUs where there are none",
        "You ask for a GPU on a machine that has none: Ray would wait for it for ever.",
        ('"GPU": 1 if gpus_per_node else 0', '"GPU": 1'),
    ),
    (
        "the share as resource",
        "You put the share into the bundle's resources. The bundle is a whole GPU, of which its "
        "ranks take shares.",
        (
            '{"GPU": 1 if gpus_per_node else 0, "CPU": 1}',
            '{"GPU": (1 / len(roles) if colocate else 1) if gpus_per_node else 0, "CPU": 1}',
        ),
    ),
)

ROOM = "len(chunks[p]) < least + (longer > 0)"
LONGEST_FIRST = "key=lambda i: (-lengths[i], i)"
FEWEST = "key=lambda p: (tokens[p], p)"

CHUNKS = mutants(
    "distributed.placement.balanced_chunks",
    (
        "cut in a row",
        "You cut the items in a row. They are to be balanced by their tokens.",
        ("part = min(room, key=lambda p: (tokens[p], p))", "part = room[0]"),
        (f"range(len(lengths)), {LONGEST_FIRST}", "range(len(lengths))"),
    ),
    (
        "dealt out in turn",
        "You deal the items out in turn. Each goes to the part that has the fewest tokens so far.",
        (FEWEST, "key=lambda p: (len(chunks[p]), p)"),
    ),
    (
        "in the order of the items",
        "You take the items as they come. Begin with the longest: the short ones fill the gaps.",
        (f"sorted(range(len(lengths)), {LONGEST_FIRST})", "range(len(lengths))"),
    ),
    (
        "shortest first",
        "You begin with the shortest item. Begin with the longest: the short ones fill the gaps.",
        (LONGEST_FIRST, "key=lambda i: (lengths[i], i)"),
    ),
    (
        "the fullest part",
        "You fill one part after the other. Each item goes to the part with the fewest tokens so "
        "far.",
        (FEWEST, "key=lambda p: (-tokens[p], p)"),
    ),
    (
        "counts not bounded",
        "You look at tokens alone. A part that gets one long item then has nothing else, and "
        "counts differ by more than one.",
        (ROOM, "True"),
    ),
    (
        "every part may have one more",
        "You let every part have one item more. Only as many as the remainder says may, or another "
        "has two less.",
        (ROOM, "len(chunks[p]) <= least"),
        ("for item in sorted", "least = (len(lengths) - 1) // parts\n    for item in sorted"),
    ),
    (
        "remainder left out",
        "You leave out the items that do not divide evenly. Every item belongs to some rank.",
        (
            f"sorted(range(len(lengths)), {LONGEST_FIRST})",
            f"sorted(range(len(lengths)), {LONGEST_FIRST})[: least * parts]",
        ),
    ),
    (
        "the first parts have one more",
        "You give the first parts one item more. Which parts have one more is decided by tokens, "
        "as the items come.",
        (ROOM, "len(chunks[p]) < least + (p < len(lengths) % parts)"),
    ),
    (
        "not in order",
        "The indices of a part stand in the order in which it got them. They are to ascend.",
        ("sorted(chunk) for chunk", "chunk for chunk"),
    ),
    (
        "parts in order",
        "You sort the parts, too. Part p belongs to rank p, whatever it holds.",
        (
            "return [sorted(chunk) for chunk in chunks]",
            "return sorted(sorted(chunk) for chunk in chunks)",
        ),
    ),
    (
        "lengths instead of indices",
        "You return the items' lengths. Their indices are asked for.",
        ("sorted(chunk) for chunk", "sorted(lengths[i] for i in chunk) for chunk"),
    ),
    (
        "the last of equal items",
        "Of equally long items you take the last one first. The earliest comes first.",
        (LONGEST_FIRST, "key=lambda i: (-lengths[i], -i)"),
    ),
    (
        "the last of equal parts",
        "Of parts with equally many tokens you take the last. Take the first.",
        (FEWEST, "key=lambda p: (tokens[p], -p)"),
    ),
    (
        "the emptiest of equal parts",
        "Of parts with equally many tokens you take the one with the fewest items. Take the first.",
        (FEWEST, "key=lambda p: (tokens[p], len(chunks[p]), p)"),
    ),
    (
        "only the last item counts",
        "You compare the parts by their last item. All of their tokens count.",
        ("tokens[part] += lengths[item]", "tokens[part] = lengths[item]"),
    ),
    (
        "items without tokens dropped",
        "You drop items without tokens. Their rank would miss a forward pass, and the others wait.",
        (
            "    return [sorted",
            "    chunks = [[i for i in c if lengths[i]] for c in chunks]\n    return [sorted",
        ),
    ),
)

MUTANTS = [*PLACE, *CHUNKS]
