"""The text of a question: its prompt, and what follows it for each choice."""

from stable_lora_jax.data.tasks import Question

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PROMPT_FORMATS = ("cloze", "letter")


def format_question(question: Question, prompt_format: str) -> tuple[str, list[str]]:
    r"""Returns the prompt and the text of each branch.

    `cloze`: "Question: {question}\nAnswer:" and " {choice}". Where choices continue the text (HellaSwag) the prompt is
    the text alone, as evaluation harnesses do. `letter`: the choices are listed and the branches are " A", " B", ...

    Raises:
      ValueError: unknown format, or more choices than letters.

    Examples:
      >>> format_question(Question("1", "Is ice cold?", ("yes", "no"), 0), "letter")
      ('Question: Is ice cold?\nA. yes\nB. no\nAnswer:', [' A', ' B'])
    """
    if prompt_format not in PROMPT_FORMATS:
        raise ValueError(
            f"unknown prompt format {prompt_format!r}; known: {', '.join(PROMPT_FORMATS)}. Use one of these."
        )
    if prompt_format == "cloze":
        prompt = question.question if question.continues else f"Question: {question.question}\nAnswer:"
        return prompt, [f" {choice}" for choice in question.choices]
    if len(question.choices) > len(_LETTERS):
        raise ValueError(
            f"question {question.id!r} has {len(question.choices)} choices; the letter format allows {len(_LETTERS)}. "
            "Use the cloze format."
        )
    letters = _LETTERS[: len(question.choices)]
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, question.choices, strict=True))
    return f"Question: {question.question}\n{listed}Answer:", [f" {letter}" for letter in letters]
