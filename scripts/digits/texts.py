"""The sentences of the digits sample, once: the data and the tokenizer are both made from them."""

QUESTION = "What digit is this?"


def critic_prompt(question: str, response_1: str, response_2: str) -> str:
    """What the worker's built-in template `critic-short` renders."""
    return f"{question}\nResponse 1: {response_1}\nResponse 2: {response_2}\nWhich response is better?"


def completion(digit: int, boxed: object) -> str:
    """Think text that reads the digit, then the boxed answer (a digit for the policy, 1 or 2 for the critic)."""
    return f"<think>I see {digit}.</think>\\boxed{{{boxed}}}"
