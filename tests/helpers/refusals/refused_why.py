"""Why each row of the tests' tables is refused: a reason, and the rows that it is for, between bars."""

RULES = {
    "two numbers that touch can be split in more than one way: another tensor would get the name": (
        "digits side by side|the same, stacked|digits glued to a literal|choices that are numbers"
    ),
    "two words that touch can be split in more than one way": "words side by side",
    "two rules would give one name: which of them made it, nobody knows afterwards": (
        "a later row is a rival's|a later row is a rival's, stacked|bound of a rival|shift of a rival"
    ),
    "what a rule makes, a `drop` would take away on the way back": "a drop of a later row",
    "a product of sizes does not say its factors": "sizes lost in a merge|parts and a factor",
    "parts of unequal length do not say where one ends": "parts left unbound",
    "a tensor would pass one way and be refused the other way": "kept, and suspected on the way back",
    "no name is left that says the tensor was there": "an empty stack",
}

CALLS = {
    "adapters are functions of dicts; files are read by `fmoe.load`": "a path|a list|nothing|a module",
    "what is no tensor has no dtype and no strides that could come back": "arrays",
    "names are text: rules match them": "a key that is no name|names that are none|no names",
    "a spec has no data to hand out": "specs as storage",
    "one tensor lies on one device, and nothing is moved without being asked": "two devices in one stack",
    "a typing mistake would otherwise filter nothing, or shard nothing": (
        "a mesh that is none|a pattern that is none|an odd choice"
    ),
    "a part is a range of an axis of that rule": "a huge range",
    "a size is a number that a tensor can have": "a huge size",
    "an address is a pattern over names": "no text for an address|no text for a name",
    "only adapters can be composed": "no adapters side by side|no adapter to choose|no family",
    "sizes and formats come from the config: guessing them would be silent": "a config that is none",
}

DIRECTORIES = {
    "its matrices are added to the weights of a model, and are none": "a LoRA adapter alone",
    "weights would be missing": (
        "a file that is not there|a link to nowhere|a file that never was|no weights|an empty index"
    ),
    "an index may only name files of its own directory": ("a file outside|a folder above|a file by its whole path"),
    "a file that was cut, or is another, holds other numbers": (
        "a header cut short|data cut short|an empty file|a header of garbage|a huge header|a Git LFS pointer"
    ),
    "two answers to which tensor a name means: readers would differ": (
        "a key in two files|a key that the index lacks|a key that the files lack|a key in another file"
    ),
    "an index says which file has which tensor, and nothing else is guessed": (
        "an index that is no JSON|an index that is a list|an index without weights|an index of lists"
    ),
    "the config says which family's rules are right": (
        "no config|a config that is no JSON|a config that is no text|a config without end|a config that is a list"
        "|no model type|an unknown model type"
    ),
    "a model without one of its experts computes something else": "a missing expert|fewer experts than config says",
    "experts are one stack: of one shape and one dtype": "an expert of another shape|an expert of another dtype",
    "config and tensors contradict each other": "more experts than config says",
    "a size or dtype would be guessed": "a size in words|a dtype that is none",
}
