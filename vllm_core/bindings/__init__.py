"""Framework adapters: the only place where a tensor framework may be imported, one package each."""
