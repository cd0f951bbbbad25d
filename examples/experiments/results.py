"""What the finished runs of an experiment found: one JSON object a line, and numbers over the seeds of a case."""

import json
import statistics
from dataclasses import dataclass

MISSING = "–"


@dataclass(frozen=True)
class Spread:
    """One number over the seeds; as text its mean and half the distance from the lowest to the highest."""

    values: tuple

    @property
    def mean(self):
        return statistics.fmean(self.values)

    @property
    def half(self):
        return (max(self.values) - min(self.values)) / 2

    def __format__(self, form):
        text = format(self.mean, form)
        return f"{text} ± {self.half:{form}}" if len(self.values) > 1 else text


class Results:
    """The finished runs of an experiment."""

    def __init__(self, records):
        self.records = records

    def results(self, **factors):
        """What was measured in the runs whose cases have these factors."""
        return [record["result"] for record in self.records
                if all(record["case"].get(name) == value for name, value in factors.items())]

    def spread(self, measured, scale=1.0, **factors):
        """`Spread` of one measured number, or None where no such run is finished."""
        values = tuple(scale * result[measured] for result in self.results(**factors))
        return Spread(values) if values else None

    def cell(self, measured, form=".1f", scale=100.0, **factors):
        """The same as text for a table; shares in per cent."""
        found = self.spread(measured, scale, **factors)
        return MISSING if found is None else format(found, form)

    def points(self, measured, factor, values, scale=100.0, **factors):
        """[(value, Spread)] along one factor, of those that are finished: what `figures.curves` takes."""
        found = [(value, self.spread(measured, scale, **{factor: value}, **factors)) for value in values]
        return [(value, spread) for value, spread in found if spread]

    def factor(self, name):
        """All values of a factor, in the order of the runs."""
        return list(dict.fromkeys(record["case"][name] for record in self.records if name in record["case"]))

    @property
    def seconds(self):
        return sum(record["seconds"] / record["jobs"] for record in self.records)

    @property
    def seeds(self):
        return len({record["seed"] for record in self.records})


def finished(path):
    """The records of a file; a last line that was not written to its end is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append(path, line):
    """Write a line more; one that was not written to its end gives way."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(f"{line}\n".encode())


def markdown(head, *rows):
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"
