METHODS: dict[str, type] = {}
