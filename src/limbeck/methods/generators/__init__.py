"""Methods that make generators: few-step samplers out of many-step ones."""
