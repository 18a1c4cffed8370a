"""Random small networks as users write them, each a piece of readable Python, and oracles for what is made of them."""
