"""The supply chain: locks of what CI and containers install, advisories, licenses, and a bill of materials."""
