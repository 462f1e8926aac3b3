"""Scenes in words, and read back from words. Whole captions say everything:

    a small red circle on the left
    a large blue star above a small green ring
    a small cyan cross at the top, a large red square at the bottom left and a small black star at the bottom right

Open ones leave any of it to the picture, and say the rest in several ways:

    a red circle        small circle on the left        the circle on the left is red        circle, small, red
    something red on the left        a thing in the centre        a circle and a blue star
"""

import re
from collections.abc import Sequence

from ldm.data.scenes import COLOURS, MAX_OBJECTS, POSITIONS, RELATIONS, SHAPES, SIZES, Object, Scene
from ldm.utils.errors import DataError

WHOLE = 0.6  # share of open captions that say everything all the same
SAID = {"shape": 0.85, "colour": 0.6, "size": 0.4, "position": 0.4}  # how often each is said in the others
RELATED = 0.5  # how often the relation of two objects is
PLAIN = 0.5  # share of the phrasing "a red circle"
NUMBERS = 4 + 4 * MAX_OBJECTS  # that an open caption is a function of


def caption(scene: Scene) -> str:
    """A scene in words; of two objects the relation is said in place of the positions. Inverse of `parse`."""
    if scene.relation:
        first, second = (_with_article(_words(thing)) for thing in scene.objects)
        return f"{first} {RELATIONS[scene.relation]} {second}"
    nouns = [_with_article(_noun(thing)) for thing in scene.objects]
    return " and ".join([", ".join(nouns[:-1]), nouns[-1]] if len(nouns) > 1 else nouns)


def open_caption(scene: Scene, u: Sequence[float]) -> str:
    """A scene in words that may leave some of it open, as `u`, NUMBERS of [0, 1), have it. Inverse of `parse`."""
    left = leave_open(scene, u[2:])
    return caption(scene) if left is scene else phrase(left, u[:2])


def leave_open(scene: Scene, u: Sequence[float]) -> Scene:
    """A scene less what its caption does not say; something is said of every object."""
    if u[0] < WHOLE:
        return scene
    relation = scene.relation if u[1] < RELATED else None
    things = [_less(thing, u[2 + 4 * k :], relation) for k, thing in enumerate(scene.objects)]
    return scene._replace(objects=tuple(things), relation=relation)


def _less(thing: Object, u: Sequence[float], relation: str | None) -> Object:
    hidden = {name: None for (name, share), v in zip(SAID.items(), u, strict=False) if v >= share}
    if relation:
        hidden["position"] = None
    return thing._replace(**hidden if len(hidden) < len(SAID) else {**hidden, "shape": thing.shape})


def phrase(scene: Scene, u: Sequence[float]) -> str:
    """A scene in one of the phrasings that suit it; two numbers of [0, 1) choose which."""
    if u[0] < PLAIN or len(scene.objects) > 1:
        return caption(scene)
    (thing,) = scene.objects
    if not thing.shape:
        return _something(thing)
    forms = [_noun, _list, _sentence] if any(_rest(thing).values()) else [_noun]
    pick = (u[0] - PLAIN) / (1 - PLAIN) * len(forms)
    return _sentence(thing, u[1]) if forms[int(pick)] is _sentence else forms[int(pick)](thing)


def _words(thing: Object) -> str:
    return " ".join(word for word in (thing.size, thing.colour, thing.shape or "thing") if word)


def _noun(thing: Object) -> str:
    return _words(thing) + (f" {_place(thing)}" if thing.position else "")


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _place(thing: Object) -> str | None:
    return POSITIONS[thing.position][2] if thing.position else None


def _rest(thing: Object) -> dict[str, str | None]:
    """All but the shape, as it is said."""
    return {"size": thing.size, "colour": thing.colour, "position": _place(thing)}


def _list(thing: Object) -> str:
    return ", ".join([thing.shape, *filter(None, _rest(thing).values())])


def _sentence(thing: Object, u: float) -> str:
    """One of what is said becomes the predicate: the small circle is red."""
    said = [name for name, word in _rest(thing).items() if word]
    name = said[int(u * len(said))]
    return f"the {_noun(thing._replace(**{name: None}))} is {_rest(thing)[name]}"


def _something(thing: Object) -> str:
    looks = " and ".join(filter(None, (thing.size, thing.colour)))
    return " ".join(filter(None, ("something", looks, _place(thing))))


_PLACES = {said: name for name, (_, _, said) in POSITIONS.items()}
_LINKS = {said: name for name, said in RELATIONS.items()}
_SIZE, _COLOUR, _SHAPE, _PLACE = (
    rf"(?P<{name}>{'|'.join(words)})"
    for name, words in {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": _PLACES}.items()
)
_NOUN = rf"(?:(?:an?|one|the) )?(?:{_SIZE} )?(?:{_COLOUR} )?(?:{_SHAPE}|thing)(?: {_PLACE})?"
_FORMS = [
    re.compile(form)
    for form in (
        _NOUN,
        rf"{_SHAPE}(?:, {_SIZE})?(?:, {_COLOUR})?(?:, {_PLACE})?",
        rf"something(?: {_SIZE})?(?:(?: and)? {_COLOUR})?(?: {_PLACE})?",
    )
]
_PREDICATE = re.compile(rf"(?P<subject>{_NOUN.replace('?P<', '?P<_')}) is (?:{_SIZE}|{_COLOUR}|{_PLACE})")
_LINK = re.compile(rf" ({'|'.join(_LINKS)}) ")


def parse(prompt: str) -> Scene:
    """The scene that a prompt asks for; what it leaves open ("a red circle") is None. DataError outside the grammar."""
    text = " ".join(prompt.lower().replace("center", "centre").strip(" .\t\n").split())
    if thing := _read(text):
        return Scene((thing,))
    parts = _LINK.split(text)
    if len(parts) == 3:
        return Scene((_object(parts[0], prompt), _object(parts[2], prompt)), _LINKS[parts[1]])
    parts = re.split(r", and |, | and ", text)
    if len(parts) > MAX_OBJECTS:
        raise DataError(f"prompt {prompt!r} has {len(parts)} parts; expected at most {MAX_OBJECTS} objects")
    return Scene(tuple(_object(part, prompt) for part in parts))


def _read(text: str) -> Object | None:
    """One object, in any of the phrasings; None where the text is none of them."""
    if match := _PREDICATE.fullmatch(text):
        subject, predicate = _read(match["subject"]), _of(match)
        said = {name: value for name, value in predicate._asdict().items() if value and name != "jitter"}
        free = all(getattr(subject, name) is None for name in said)
        return subject._replace(**said) if free else None
    return next((_of(match) for form in _FORMS if (match := form.fullmatch(text))), None)


def _of(match: re.Match) -> Object:
    said = match.groupdict()
    return Object(said.get("shape"), said["colour"], said["size"], _PLACES.get(said["place"]))


def _object(text: str, prompt: str) -> Object:
    if (thing := _read(text)) is None:
        raise DataError(
            f"prompt {prompt!r} is no scene of shapes: {text!r} is not 'a [size] [colour] shape [place]' such as "
            f"'a small red circle on the left' or 'a circle'; sizes {', '.join(SIZES)}; colours {', '.join(COLOURS)}; "
            f"shapes {', '.join(SHAPES)}; places {', '.join(_PLACES)}"
        )
    return thing
