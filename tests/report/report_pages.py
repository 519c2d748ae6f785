"""What tests ask of an HTML page."""

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Parses a page strictly: every element closed in order, every id once."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words, self.text_in = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids)), "an id stands twice"
        targets = {value.partition("#")[2].rstrip(")") for _, a in self.elements for key, value in a.items() if key in ("href", "clip-path")}
        assert targets <= set(ids), f"links to nothing: {targets - set(ids)}"

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute of <{tag}> stands twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> is out of order"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if self.open:
            self.text_in.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


def check_self_contained(text, page):
    """Nothing is fetched, nothing runs, and every picture has words."""
    assert "http" not in text
    assert "//" not in text.replace("base64,", "").partition("<body>")[0]
    assert "@import" not in text
    assert "url(" not in text.partition("<body>")[0]
    assert not page.all("script")
    assert not page.all("link")
    for attributes in page.all("img"):
        assert attributes["src"].startswith("data:")
        assert attributes["alt"]
    for attributes in page.all("svg"):
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 20
    for _, attributes in page.elements:
        assert not any(key.startswith("on") for key in attributes)
        assert attributes.get("href", "#").startswith("#")
