"""Questions about a drawn scene, with short answers that the picture alone gives."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.random import Generator

from vlscale.data.scenes.drawing import COLOURS, RELATIONS, SHAPES, Group, Scene, plural

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")  # two groups of at most three


def questions(scene: Scene, rng: Generator) -> list[dict[str, str]]:
    """Four of them as the json of a sample holds them: colour or shape, number, relation, and yes or no.

    Yes and no are equally likely, and a question to be denied names a colour or a shape that is in the picture.
    """
    which, property_, counted, asked, present = rng.integers(2, size=5).tolist()
    group, other = (scene.second, scene.first) if which else (scene.first, scene.second)
    asked_of, answers = (scene.second, scene.first) if asked else (scene.first, scene.second)
    pairs = (
        _property(group, other, bool(property_)),
        _number(scene, group, bool(counted)),
        (f"what is {RELATIONS[scene.axis][1 - asked]} the {_plain(asked_of, answers)}?", _some(answers, asked_of)),
        (f"is there {_with_article(group.name)}?", "yes") if present else (_denied(scene, rng), "no"),
    )
    return [{"q": question, "a": answer} for question, answer in pairs]


def _property(group: Group, other: Group, colour: bool) -> tuple[str, str]:
    """Its colour or its shape, whichever may be asked without giving the answer for the other group."""
    several = group.count > 1
    colour_name, shape_name = COLOURS[group.colour][0], SHAPES[group.shape][0]
    if group.shape != other.shape and (colour or group.colour == other.colour):
        return f"what color {'are' if several else 'is'} the {_number_of(shape_name, several)}?", colour_name
    one = _number_of("one", several)
    return f"what shape {'are' if several else 'is'} the {colour_name} {one}?", shape_name


def _number(scene: Scene, group: Group, of_shape: bool) -> tuple[str, str]:
    """How many things have the shape, or the colour, of this group."""
    if of_shape:
        count = sum(thing.group.shape == group.shape for thing in scene.things)
        return f"how many {plural(SHAPES[group.shape][0])} are there?", NUMBERS[count]
    count = sum(thing.group.colour == group.colour for thing in scene.things)
    return f"how many {COLOURS[group.colour][0]} shapes are there?", NUMBERS[count]


def _denied(scene: Scene, rng: Generator) -> str:
    """A question for a kind that is not in the picture but has the colour or the shape of one that is."""
    groups = (scene.first, scene.second)
    absent = sorted(set(_near(groups)) - {(group.colour, group.shape) for group in groups})
    colour, shape = absent[int(rng.integers(len(absent)))]
    return f"is there {_with_article(f'{COLOURS[colour][0]} {SHAPES[shape][0]}')}?"


def _near(groups: tuple[Group, ...]) -> Iterator[tuple[int, int]]:
    """(colour, shape) of every kind that shares one of the two with a group."""
    for group in groups:
        yield from ((group.colour, shape) for shape in range(len(SHAPES)))
        yield from ((colour, group.shape) for colour in range(len(COLOURS)))


def _kind(group: Group, other: Group) -> str:
    """What tells a group from the other: the shape, with its colour where both have the same."""
    return group.name if group.shape == other.shape else SHAPES[group.shape][0]


def _plain(group: Group, other: Group) -> str:
    """`star`, `stars`, `red stars`."""
    return _number_of(_kind(group, other), group.count > 1)


def _some(group: Group, other: Group) -> str:
    """`a star`, `an orange star`, `two stars`."""
    if group.count == 1:
        return _with_article(_kind(group, other))
    return f"{NUMBERS[group.count]} {_plain(group, other)}"


def _number_of(noun: str, several: bool) -> str:
    return plural(noun) if several else noun


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
