import json
import re

from pipelines.denoising_page import write_page
from pipelines.live_view import Frame


def test_the_page_holds_every_frame_and_needs_no_network(tmp_path):
    frames = [Frame(f"step {step}", ["th", "\u00e9"], "pn", [-1, step]) for step in range(3)]
    samples = [[*frames], [*frames]]
    samples[1].append(Frame("a text that would end the data", ["</script><!--<script>"], "k", [-1]))
    write_page(tmp_path / "new" / "page.html", samples, "A <b> title", "settings & more")
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S).group(1))
    assert [[tuple(frame[:4]) for frame in sample] for sample in data] == [
        [(f.title, f.pieces, f.kinds, f.heat) for f in frames] for frames in samples
    ]
    assert "A &lt;b&gt; title" in page and "settings &amp; more" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert page.count("</script>") == 2
