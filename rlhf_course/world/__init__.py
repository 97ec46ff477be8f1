"""The embedded worlds: corpus, demonstrations, labeler and gold reward, made from a seed.

    from rlhf_course.world import make_world
    world = make_world("town", size="small", seed=0)      # or "reviews"

`town` is about knowing: people of whom the corpus tells and people of whom it does not.
`reviews` is about doing better than one's demonstrations. Both need no file and no network.
"""

from rlhf_course.errors import ConfigError
from rlhf_course.world.base import (
    PURPOSES,
    Comparison,
    Demonstration,
    Prompt,
    World,
)
from rlhf_course.world.labeler import plackett_luce
from rlhf_course.world.reviews import Reviews
from rlhf_course.world.town import Town

WORLDS: dict[str, type[World]] = {"town": Town, "reviews": Reviews}


def make_world(name: str, size: str = "small", seed: int = 0) -> World:
    """Make the world called `name` ("town" or "reviews").

    Args:
        name: which world.
        size: "tiny" (tests), "small" (a laptop) or "gpt2" (a GPU).
        seed: any int; the same seed gives the same world everywhere.

    Raises:
        ConfigError: there is no such world or size.
    """
    if name not in WORLDS:
        raise ConfigError(f"there is no world {name!r}; choose one of {', '.join(WORLDS)}")
    return WORLDS[name](size, seed)


__all__ = [
    "PURPOSES",
    "WORLDS",
    "Comparison",
    "Demonstration",
    "Prompt",
    "Reviews",
    "Town",
    "World",
    "make_world",
    "plackett_luce",
]
