"""The conversations of the parity suite, in OpenAI's content-parts form with paths relative to fixtures/cases."""

from dataclasses import dataclass


@dataclass
class Case:
    """A conversation; `tables` stores rotary tables and windows too."""

    name: str
    messages: list
    template: str | None = None
    tables: bool = False


def image(name):
    return {"type": "image_url", "image_url": {"url": f"media/{name}"}}


def video(kind, count, fps):
    return {"type": "video", "video": [f"media/{kind}-{index}.png" for index in range(count)], "fps": fps}


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def say(role, value):
    return {"role": role, "content": value}


# Line ends of two kinds, zero-width and right-to-left letters, decomposed accents, blanks, digits, and signs.
UNICODE = (
    "one\r\ntwo\rthree\n\n four  \t five\u200b\u200dsix \u202eseven\u202c "
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd e\u0301 o\u0308 A\u030a \ufb01 12345 it's THEY'RE "
    "\U0001f9d1\u200d\U0001f680 \u4f60\u597d <tool_call>{\"a\": 1}</tool_call> \u00a0 end  "
)
MULTI_TURN = [
    say("system", "You compare two answers."),
    user(image("golden.png"), text("What is shown in this picture?")),
    say("assistant", "Red circles and a bar."),
    user(text("And in this one: "), image("speck.png"), text("?")),
]
FORMATS = ["palette.gif", "palette.png", "alpha.png", "grey.png", "lossless.webp", "turned.png"]

COMMON = [
    Case("text", [say("user", "Which of the two answers is better?")], tables=True),
    Case("system", [say("system", "Think step by step."), say("user", "How many squares?")]),
    Case("unicode", [user(text(UNICODE))]),
    Case("image", [user(image("golden.png"), text("What is shown in this picture?"))]),
    Case("image_tall", [user(image("tall.png"), text("Describe it."))]),
    Case("two_images", [user(image("tall.png"), image("golden.png"), text("Which of the two is better?"))], tables=True),
    Case("multi_turn", MULTI_TURN),
    Case("interleaved", [user(text("First "), image("golden.png"), text(" then "), image("alpha.png"), text(" and "),
                              video("even", 4, 2.0), text(" which?"))], tables=True),
    Case("formats", [user(*map(image, FORMATS), text("Count them."))]),
    Case("jpeg", [user(image("turned.jpg"), text("What is shown?"))]),
    Case("video", [user(video("even", 4, 2.0), text("What happens in this video?"))], tables=True),
    Case("video_odd", [user(video("odd", 5, 1.25), text("What happens in this video?"))]),
]

QWEN_CASES = [
    *COMMON,
    Case("image_ragged", [user(image("wide.png"), text("Describe the first frame."))], tables=True),
    Case("image_even_windows", [user(image("square.png"), text("Describe it."))], tables=True),
    Case("image_shrunk", [user(image("large.png"), text("Describe it."))]),
    Case("video_fast", [user(video("even", 5, 4.0), text("What happens?"))]),
    Case("two_videos", [user(video("even", 4, 2.0), text(" or "), video("odd", 3, 0.8), text(", which one?"))]),
]

LLAVA_CASES = [
    *COMMON,
    Case("image_square", [user(image("even-0.png"), text("What is shown in this picture?"))]),
    Case("image_shrunk", [user(image("wide.png"), text("Describe it."))]),
    Case("image_and_video", [user(image("golden.png"), video("even", 3, 2.0), text("Compare them."))]),
    Case("older_image", [user(image("golden.png"), text("What is shown?"))], template="older"),
    Case("older_multi_turn", [user(text("Hello")), {"role": "assistant", "content": [text("Yes?")]},
                              user(image("golden.png"), image("speck.png"), text("Which?"))], template="older"),
    Case("older_video", [user(video("even", 2, 2.0), text("What happens?"))], template="older"),
]

# Cases whose loss is differentiated, by family.
GRADIENTS = {
    "qwen2.5-vl": ["two_images", "interleaved"],
    "llava-onevision": ["image_shrunk", "interleaved"],
}
# Cases that the reference also runs as one left-padded batch.
LEFT_PADDED = ["text", "image", "two_images"]
