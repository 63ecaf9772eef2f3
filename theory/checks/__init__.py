"""The checks of a run, by kind; `theory.check` puts them together."""
