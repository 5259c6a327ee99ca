from compress.quantize.rtn import RTN

METHODS: dict[str, type] = {"rtn": RTN}
