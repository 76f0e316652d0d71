"""Programs: pairs of Pyro programs read, checked and weighed; nothing else here touches what Pyro records."""
