"""The soak: bin/soak. Mixed work below capacity, for long; nothing may grow, drift, get lost or be done twice."""
