TRANSFORMS: dict[str, type] = {}
