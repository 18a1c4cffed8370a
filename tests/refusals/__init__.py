"""Every sentence with which a fold is refused, each with the smallest model of which it is true."""
