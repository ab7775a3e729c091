"""The five stages, one recipe each: `main(cfg, run) -> metrics`."""
