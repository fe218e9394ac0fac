"""Types of Parquet columns for values of JSON, as `datasets.load_dataset` finds them in JSON Lines.

Objects that all have the same keys are a struct; others, and values of several types, are JSON in a string of the
extension type arrow.json, which `datasets` reads as its Json feature and turns back into objects. So the rows of a
Parquet file and those of JSON Lines are equal once they are loaded, tool calls with different arguments too.
"""

from typing import TypeAlias

# None: nulls alone; "bool", "int", "float", "string", "json"; [shape]: a list; {key: shape}: a struct
Shape: TypeAlias = "str | list | dict | None"

_SCALARS = {bool: "bool", int: "int", float: "float", str: "string"}


def widened(shape: Shape, value) -> Shape:
    """The shape that holds what the shape holds, and a value."""
    if value is None or shape == "json":
        return shape
    if isinstance(value, dict):
        if shape is None and value:
            shape = dict.fromkeys(value)
        if not isinstance(shape, dict) or shape.keys() != value.keys():
            return "json"
        return {key: widened(known, value[key]) for key, known in shape.items()}
    if isinstance(value, list):
        if shape is None:
            shape = [None]
        if not isinstance(shape, list):
            return "json"
        (item,) = shape
        for each in value:
            item = widened(item, each)
        return [item]
    kind = _SCALARS[type(value)]
    if kind == "int" and not -(2**63) <= value < 2**63:
        return "json"
    if shape in (None, kind):
        return kind
    return "float" if shape in ("int", "float") and kind in ("int", "float") else "json"


def arrow_type(shape: Shape):
    """The pyarrow type of a shape."""
    import pyarrow

    if isinstance(shape, list):
        return pyarrow.list_(arrow_type(shape[0]))
    if isinstance(shape, dict):
        return pyarrow.struct([(key, arrow_type(known)) for key, known in shape.items()])
    if shape == "json":
        return pyarrow.json_() if hasattr(pyarrow, "json_") else pyarrow.string()
    types = {None: pyarrow.null, "bool": pyarrow.bool_, "int": pyarrow.int64, "float": pyarrow.float64}
    return types.get(shape, pyarrow.string)()


def arrow_array(values: list, shape: Shape):
    """The values as an array of the type of the shape."""
    import orjson
    import pyarrow

    if isinstance(shape, list):
        present = [value is not None for value in values]
        items = [item for value in values if value is not None for item in value]
        ends, offsets = 0, [0]
        for value in values:
            ends += 0 if value is None else len(value)
            offsets.append(ends)
        # a null in the offsets is a null list
        begins = [begin if there else None for begin, there in zip(offsets, present, strict=False)]
        offsets = pyarrow.array([*begins, ends], pyarrow.int32())
        return pyarrow.ListArray.from_arrays(offsets, arrow_array(items, shape[0]))
    if isinstance(shape, dict):
        columns = [arrow_array([None if v is None else v[key] for v in values], known) for key, known in shape.items()]
        missing = pyarrow.array([value is None for value in values], pyarrow.bool_())
        return pyarrow.StructArray.from_arrays(columns, fields=list(arrow_type(shape)), mask=missing)
    if shape == "json":
        values = [None if value is None else orjson.dumps(value).decode() for value in values]
        texts = pyarrow.array(values, pyarrow.string())
        return pyarrow.ExtensionArray.from_storage(arrow_type(shape), texts) if hasattr(pyarrow, "json_") else texts
    return pyarrow.array(values, arrow_type(shape))
