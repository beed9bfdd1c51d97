"""Writes the tables of docs/training-recipes.md from the table in the code.

Run it from the repository: ``python docs/scripts/make_recipes.py``.
"""

from __future__ import annotations

from pathlib import Path

from simexplain.training.recipes import recipe_page

PAGE = Path(__file__).parents[1] / "training-recipes.md"


def main() -> None:
    """Replaces everything from the first recipe on."""
    head, _, _ = PAGE.read_text(encoding="utf-8").partition("\n## ")
    PAGE.write_text(f"{head}\n{recipe_page()}", encoding="utf-8")


if __name__ == "__main__":
    main()
