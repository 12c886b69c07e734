"""Steering as text: `topic/sports@0.3:commitment - sentiment/negative`.

    expression  [-] push { (+ | -) push }
    push        source [@ strength] [: schedule] { option }
    source      NAME            an attribute
                NAME:INDEX      a feature of an SAE
                vector(NAME)    a loaded vector
    schedule    NAME, or NAME(key=JSON, ...) with its options
    option      a space, then op=NAME, unit=NAME, scope=NAME, scope=[start,stop], layers=[N,...] or direction=NAME

A name starts with a letter and goes on in letters, digits and `_ . / -`; any other is a JSON string, quotes and all. A
minus sign pushes the other way: at minus the strength, which is the attribute's own where none is written.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import copysign
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from steerserve.server.protocol.steering import Intervention

MAX_CHARACTERS: Final = 20_000
OPTIONS: Final = ("op", "unit", "scope", "layers", "direction")
_BARE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_INDEX: Final = re.compile(r"[0-9]{1,10}(?![A-Za-z0-9_./-])")
_NUMBER: Final = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_OPTION: Final = re.compile(r"[ \t\r\n]+([A-Za-z_]+)=")
_SPACE: Final = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Written:
    """One push of a text: the fields of an intervention, and where in the text they stand."""

    fields: dict[str, Any]
    start: int
    """Where the push begins, counted from 0."""
    places: Mapping[str, int]
    """Where the value of a field begins."""


def parse(text: str) -> list[Written]:
    """The pushes of a text; what their values may be is not checked. Raises ValueError with the character."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"must have {MAX_CHARACTERS} characters at most; it has {len(text)}")
    return list(_Reader(text).pushes())


def at(place: int) -> str:
    """A place in a text, as an error names it: its first character is 1."""
    return f"character {place + 1}"


def text_of(interventions: "Sequence[Intervention]") -> str | None:
    """The interventions as text, which `parse` reads back as they are; None where text cannot say them: none at all, a
    condition (`when`), or a vector that is given by its values."""
    told = ""
    for i, one in enumerate(interventions):
        source = _source(one)
        if source is None or one.when is not None:
            return None
        negative = one.negate or (one.strength is not None and copysign(1.0, one.strength) < 0)
        if i:
            told += " - " if negative else " + "
        elif negative:
            told += "-"
        told += source
        if one.strength is not None:
            told += "@" + repr(abs(one.strength)).removesuffix(".0")
        if one.schedule is not None:
            told += ":" + _schedule(one.schedule)
        told += "".join(f" {name}={value}" for name, value in _options(one))
    return told or None


def _source(one: "Intervention") -> str | None:
    if one.attribute is not None:
        return _name(one.attribute)
    if one.feature is not None:
        return f"{_name(one.feature.sae)}:{one.feature.index}"
    if one.vector is not None and one.vector.name is not None:
        return f"vector({_name(one.vector.name)})"
    return None


def _schedule(schedule: str | Mapping[str, Any]) -> str:
    if isinstance(schedule, str):
        return _name(schedule)
    options = [f"{_name(key)}={_json(value)}" for key, value in schedule.items() if key != "type"]
    return f"{_name(schedule['type'])}({', '.join(options)})"


def _options(one: "Intervention") -> Iterator[tuple[str, str]]:
    if one.op != "add":
        yield "op", one.op
    if one.unit is not None:
        yield "unit", one.unit
    if one.scope is not None:
        yield "scope", one.scope if isinstance(one.scope, str) else _json(one.scope.positions)
    if one.layers is not None:
        yield "layers", _json(one.layers)
    if one.direction != "sae":
        yield "direction", one.direction


def _name(name: str) -> str:
    return name if _BARE.fullmatch(name) else _json(name)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _not_finite(name: str) -> None:
    raise ValueError(f"{name} is not a number here")


class _Reader:
    """Reads a text from left to right; `place` is the next character."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0
        self._decoder = json.JSONDecoder(parse_constant=_not_finite)

    def pushes(self) -> Iterator[Written]:
        self._skip()
        negative = self._take("-")
        while True:
            self._skip()
            yield self._push(negative)
            self._skip()
            if self.place == len(self.text):
                return
            negative = self._take("-")
            if not negative and not self._take("+"):
                raise self._expected("'+', '-', '@', ':' or ' option=value'")

    def _push(self, negative: bool) -> Written:
        start = self.place
        fields, places = {}, {}
        name, source = self._source()
        fields[name], places[name] = source, start
        if self._take("@"):
            places["strength"] = self.place
            number = self._match(_NUMBER, "a number without a sign")
            fields["strength"] = -float(number) if negative else float(number)
        elif negative:
            fields["negate"], places["negate"] = True, start
        if self._take(":"):
            places["schedule"] = self.place
            fields["schedule"] = self._schedule()
        while (key := self._option(fields)) is not None:
            places[key] = self.place
            fields[key] = self._value(key)
        return Written(fields, start, places)

    def _source(self) -> tuple[str, Any]:
        if self.text.startswith("vector(", self.place):
            self.place += len("vector(")
            self._skip()
            name = self._name("a vector's name")
            self._skip()
            self._need(")")
            return "vector", {"name": name}
        name = self._name("the name of an attribute or SAE, or 'vector(NAME)'")
        index = _INDEX.match(self.text, self.place + 1) if self.text[self.place : self.place + 1] == ":" else None
        if index is None:
            return "attribute", name
        self.place = index.end()
        return "feature", {"sae": name, "index": int(index[0])}

    def _schedule(self) -> str | dict[str, Any]:
        name = self._name("a schedule's name or a feature's index")
        if not self._take("("):
            return name
        found: dict[str, Any] = {"type": name}
        self._skip()
        while not self._take(")"):
            if len(found) > 1:
                self._need(",")
                self._skip()
            place = self.place
            key = self._name("an option's name or ')'")
            if key in found:
                self.place = place
                raise self._wrong("'type' is the schedule's name" if key == "type" else f"{key} is given twice")
            self._need("=")
            found[key] = self._json()
            self._skip()
        return found

    def _option(self, given: Mapping[str, Any]) -> str | None:
        """The name of the option that follows, read with its `=`; None where none does."""
        found = _OPTION.match(self.text, self.place)
        if found is None:
            return None
        self.place = found.start(1)
        if found[1] not in OPTIONS:
            raise self._wrong(f"{found[1]} is no option; there are {', '.join(OPTIONS)}")
        if found[1] in given:
            raise self._wrong(f"{found[1]} is given twice")
        self.place = found.end()
        return found[1]

    def _value(self, key: str) -> Any:
        if key == "layers" or (key == "scope" and self.text[self.place : self.place + 1] == "["):
            value = self._json()
            return {"positions": value} if key == "scope" else value
        return self._name(f"a name for {key}")

    def _name(self, what: str) -> str:
        if self.text[self.place : self.place + 1] != '"':
            return self._match(_BARE, what)
        value = self._json()
        assert isinstance(value, str)
        return value

    def _json(self) -> Any:
        start = self.place
        try:
            value, self.place = self._decoder.raw_decode(self.text, start)
            # Half a surrogate pair is a string of Python's and of nobody else's.
            _json(value).encode()
        except (ValueError, RecursionError) as error:
            self.place = getattr(error, "pos", start)
            raise self._wrong("must be JSON") from None
        return value

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.place)
        if found is None:
            raise self._expected(what)
        self.place = found.end()
        return found[0]

    def _skip(self) -> None:
        self._match(_SPACE, "")

    def _take(self, character: str) -> bool:
        found = self.text.startswith(character, self.place)
        self.place += found
        return found

    def _need(self, character: str) -> None:
        if not self._take(character):
            raise self._expected(repr(character))

    def _expected(self, what: str) -> ValueError:
        found = repr(self.text[self.place : self.place + 12]) if self.place < len(self.text) else "the end"
        return self._wrong(f"expected {what}, found {found}")

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{at(self.place)}: {what}")
