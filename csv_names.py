"""Which object and which feature a name in a CSV file means.

A name is known exactly, or by its letters and digits if they are nobody else's: 'Wind Speed (m/s)'
is the feature wind_speed, 'lan 01' the object LAN-01. A unit that is not the feature's is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from csv_times import Interval


@dataclass(frozen=True)
class Feature:
    id: int
    name: str
    unit: str | None
    interval: Interval


@dataclass(frozen=True)
class Object:
    id: int
    name: str
    features: dict[str, Feature] = field(hash=False, compare=False)


def key(name: str) -> str:
    """Return what is left of a name without case, blanks and signs: Wind_Speed, windspeed."""
    return "".join(filter(str.isalnum, name.casefold()))


def split_unit(head: str) -> tuple[str, str | None]:
    """Return the name and the unit of a head like 'Wind speed (m/s)'."""
    found = re.fullmatch(r"(.*\S)\s*[(\[]([^()\[\]]*)[)\]]\s*", head)
    return (found[1], found[2].strip()) if found else (head.strip(), None)


class Park:
    """The objects and features of the database, found by the names that files give them."""

    def __init__(self, objects: list[Object], settings: dict[str, Any]) -> None:
        self.objects = {one.name: one for one in objects}
        self.columns = settings.get("columns", {})
        self.renamed = settings.get("objects", {})
        self._keys = Counter(key(name) for name in self.objects)
        self._by_key = {key(name): one for name, one in self.objects.items()}

    def problems(self) -> list[str]:
        """Return what is wrong with the names that the settings give."""
        features = {name for one in self.objects.values() for name in one.features}
        keys = {key(name) for name in features}
        return ([f"--column {name!r}={target}: there is no feature {target!r}; there are "
                 f"{', '.join(sorted(features)) or 'none'}"
                 for name, target in self.columns.items()
                 if target and key(target) not in keys
                 and key(self._leading_object(target)[1]) not in keys]
                + [f"objects, {name!r}: there is no object {target!r}"
                   for name, target in self.renamed.items() if target not in self.objects])

    def object(self, text: str) -> Object | None:
        """Return the object of this name, by its letters and digits if they are nobody else's."""
        text = self.renamed.get(text, text)
        if text in self.objects:
            return self.objects[text]
        return self._by_key.get(key(text)) if self._keys[key(text)] == 1 else None

    def signal(self, text: str, object_: Object | None) -> tuple[Object, Feature] | None:
        """Return object and feature that a column's head or a signal's name means.

        Without an object the text must begin with one's name: LAN-01.WindSpeed. None: nothing
        here. Raise `ValueError` if the head's unit is another than the feature's.
        """
        given = self.columns.get(text.strip())
        name, unit = split_unit(text) if given is None else (given, None)
        if object_ is None:
            object_, name = self._leading_object(name)
        if object_ is None or not (feature := _feature(object_, name)):
            return None
        if unit and feature.unit and key_of_unit(unit) != key_of_unit(feature.unit):
            raise ValueError(f"column {text!r} is in {unit!r}, feature {feature.name!r} of "
                             f"{object_.name} in {feature.unit!r}; if that is the same, say "
                             f"--column {text!r}={feature.name}")
        return object_, feature

    def _leading_object(self, text: str) -> tuple[Object | None, str]:
        for end in range(len(text) - 1, 0, -1):  # the longest name first
            if not text[end].isalnum() and (found := self.object(text[:end])):
                return found, text[end + 1:]
        return None, text

    def named_in(self, stem: str) -> list[Object]:
        """Return the objects whose name stands in a file's name: LAN-10 is not LAN-1."""
        found = [one for one in self.objects.values() if re.search(
            rf"(?<![^\W_]){re.escape(one.name)}(?![^\W_])", stem, re.IGNORECASE)]
        return [one for one in found if not any(one.name != other.name and one.name in other.name
                                                for other in found)]


def _feature(object_: Object, name: str) -> Feature | None:
    if name in object_.features:
        return object_.features[name]
    alike = [f for f in object_.features.values() if key(f.name) == key(name)]
    return alike[0] if len(alike) == 1 else None


def key_of_unit(unit: str) -> str:
    return re.sub(r"\s", "", unit).casefold().replace("°", "deg").replace("degrees", "deg")
