"""What an hour of a card costs, so that a finding's device hours can be told as money."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lens.settings import SettingsError

_WANTED = "use an amount and a currency, such as `2.5 USD`, or one a card model: `H200 4.1, MI300X 3.2 USD`"
_CURRENCY = re.compile(r"\s+([A-Z]{3}|[€$£¥])$")
_ENTRY = re.compile(r"(?:(?P<model>.*\S)\s+)?(?P<amount>\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Prices:
    """Prices of one card for one hour, in one currency."""

    currency: str = ""
    any_model: float | None = None
    by_model: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str | None) -> Prices:
        """Prices as the setting ``device_hour_price`` writes them; none of None.

        A model is named by any part of the name its driver gives; an amount without a model is for all others.

        Raises:
            SettingsError: not of that form.
        """
        if text is None:
            return cls()
        currency = _CURRENCY.search(text.strip())
        if currency is None:
            raise SettingsError(f"device_hour_price = {text!r} names no currency: {_WANTED}")
        any_model, by_model = None, {}
        for entry in text.strip()[: currency.start()].split(","):
            found = _ENTRY.fullmatch(entry.strip())
            if found is None:
                raise SettingsError(f"device_hour_price = {text!r}: {entry.strip()!r} is not a price; {_WANTED}")
            if found["model"] is None:
                any_model = float(found["amount"])
            else:
                by_model[found["model"]] = float(found["amount"])
        return cls(currency[1], any_model, by_model)

    def of(self, ranks: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
        """{"amount", "currency"} of the mean card of a run; None if the price of one of its cards is not known."""
        known = [self._of_model(str(rank.get("model") or "")) for rank in ranks] or [self.any_model]
        prices = [price for price in known if price is not None]
        if len(prices) < len(known):
            return None
        return {"amount": round(sum(prices) / len(prices), 6), "currency": self.currency}

    def _of_model(self, model: str) -> float | None:
        named = [name for name in self.by_model if name.lower() in model.lower()]
        return self.by_model[max(named, key=len)] if named else self.any_model
