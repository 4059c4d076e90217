"""One module a family. `model.family` in a recipe names the module; each offers `build(plan, audit) -> Model`."""
