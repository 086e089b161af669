# SPDX-License-Identifier: Apache-2.0
"""What has been measured so far, in a file from which a later run continues."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_spechub.measure.benchmark.interleaved import Row, Run


@dataclass
class State:
    """The measurements of one tuning. The file is rewritten after each of them."""

    path: Path
    settings: dict[str, Any]
    # by rule, then by number of children: the acceptance rate of each slot
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    # by rule: simulated tokens per step
    simulated: dict[str, float] = field(default_factory=dict)
    # by a static tree: the best widths of as many nodes and levels
    widths: dict[str, str] = field(default_factory=dict)
    rows: dict[Run, Row] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, settings: dict[str, Any]) -> "State":
        """Read the file, or begin with no measurements if it does not exist.

        Raises:
            ValueError: the file was measured with other settings, or is not a state file.
        """
        state = cls(path, json.loads(json.dumps(settings)))
        if not path.exists():
            return state
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            rows = [
                Row(**row | {"accepted_by_depth": tuple(row["accepted_by_depth"])})
                for row in record["rows"]
            ]
            earlier, state.rates = record["settings"], record["rates"]
            state.simulated, state.widths = record["simulated"], record["widths"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a state file of this version: choose another --out, or delete it"
            ) from error
        differ = [
            f"{key} was {earlier.get(key)!r}, is {value!r}"
            for key, value in state.settings.items()
            if earlier.get(key) != value
        ]
        if differ:
            raise ValueError(
                f"{path} was measured with other settings ({'; '.join(differ)}): "
                "use the same settings, choose another --out, or delete it"
            )
        state.rows = {row.run: row for row in rows}
        return state

    def add(self, row: Row) -> None:
        """Add a measurement and write the file."""
        self.rows[row.run] = row
        self.write()

    def write(self) -> None:
        """Write the file."""
        record = {
            "settings": self.settings,
            "rates": self.rates,
            "simulated": self.simulated,
            "widths": self.widths,
            "rows": [asdict(row) for row in self.rows.values()],
        }
        # an interrupt must not leave half a file behind
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)
