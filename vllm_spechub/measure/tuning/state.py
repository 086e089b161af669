# SPDX-License-Identifier: Apache-2.0
"""What has been measured so far, in a file that a later run goes on from."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_spechub.measure.benchmark.interleaved import Row, Run


@dataclass
class State:
    """Measurements of one tuning, written down after each."""

    path: Path
    settings: dict[str, Any]
    # by rule, then by number of children: acceptance of each slot; and simulated tokens per step
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    simulated: dict[str, float] = field(default_factory=dict)
    rows: dict[Run, Row] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, settings: dict[str, Any]) -> "State":
        """What the file holds, or nothing if there is none.

        Raises:
            ValueError: it was measured with other settings.
        """
        state = cls(path, json.loads(json.dumps(settings)))
        if not path.exists():
            return state
        record = json.loads(path.read_text(encoding="utf-8"))
        differ = [
            f"{key} was {record['settings'].get(key)!r}, is {value!r}"
            for key, value in state.settings.items()
            if record["settings"].get(key) != value
        ]
        if differ:
            raise ValueError(
                f"{path} was measured with other settings ({'; '.join(differ)}): "
                "give those, choose another --out, or delete it"
            )
        state.rates, state.simulated = record["rates"], record["simulated"]
        for values in record["rows"]:
            values["accepted_by_depth"] = tuple(values["accepted_by_depth"])
            state.add(Row(**values), write=False)
        return state

    def add(self, row: Row, write: bool = True) -> None:
        self.rows[row.run] = row
        if write:
            self.write()

    def of(self, methods: Collection[str]) -> list[Row]:
        return [row for row in self.rows.values() if row.method in methods]

    def write(self) -> None:
        record = {
            "settings": self.settings,
            "rates": self.rates,
            "simulated": self.simulated,
            "rows": [asdict(row) for row in self.rows.values()],
        }
        # an interrupt must not leave half a file
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)
