"""Lines of text that tokenizers trip over: many scripts, code, emoji, blanks, control characters, broken UTF-8."""

import json
import pathlib
import random
import sysconfig
import unicodedata
from collections.abc import Iterator

SENTENCES = (
    "All human beings are born free and equal in dignity and rights.",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren; Straße, Grüße, ÄÖÜ.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits, n'est-ce pas ?",
    "Todos los seres humanos nacen libres e iguales en dignidad y derechos. ¿Y tú? ¡Sí!",
    "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "Усі люди народжуються вільними і рівними у своїй гідності та правах, об'єднані.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "תמיד נִקּוּד בָּעִבְרִית",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে।",
    "மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.",
    "మానవులెల్లరును జన్మతః స్వతంత్రులు.",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
    "人人生而自由,在尊嚴和權利上一律平等。「繁體」",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。ｶﾀｶﾅ",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. ㅋㅋㅋ",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. İstanbul'da ışık",
    "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.",
    "Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ ու իրավունքներով։",
    "ሰው ሁሉ ነጻ ሆኖ ሲወለድ በክብርና በመብትም እኩልነት ያለው ነው።",
    "လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း",
    "មនុស្សទាំងអស់ កើតមកមានសេរីភាព និងសមភាព",
    "ᎠᏓᏅᏙ ᏂᎦᏓ ᎠᏂᏴᏫ; Ọmọnìyàn; Þór; ħaqq; ŋ; ɸʷ; ᠮᠣᠩᠭᠣᠯ; ꦗꦮ; 𐌲𐌿𐍄; 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𝟙𝟚𝟛; ⅷ ½ ² ₃",
)
# One range of code points for each of many scripts; unassigned ones in them are taken as well.
RANGES = (
    (0x20, 0x7E), (0xA0, 0x17F), (0x180, 0x24F), (0x250, 0x2AF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F),
    (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF), (0x700, 0x74F), (0x780, 0x7BF), (0x900, 0x97F), (0x980, 0x9FF),
    (0xA00, 0xA7F), (0xA80, 0xAFF), (0xB00, 0xB7F), (0xB80, 0xBFF), (0xC00, 0xC7F), (0xC80, 0xCFF), (0xD00, 0xD7F),
    (0xD80, 0xDFF), (0xE00, 0xE7F), (0xE80, 0xEFF), (0xF00, 0xFFF), (0x1000, 0x109F), (0x10A0, 0x10FF),
    (0x1100, 0x11FF), (0x1200, 0x137F), (0x13A0, 0x13FF), (0x1400, 0x167F), (0x1780, 0x17FF), (0x1800, 0x18AF),
    (0x1E00, 0x1EFF), (0x1F00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x209F), (0x20A0, 0x20CF), (0x2100, 0x214F),
    (0x2150, 0x218F), (0x2190, 0x21FF), (0x2200, 0x22FF), (0x2500, 0x259F), (0x2600, 0x27BF), (0x2E80, 0x2FDF),
    (0x3000, 0x30FF), (0x3130, 0x318F), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xA4CF), (0xAC00, 0xD7A3),
    (0xE000, 0xE0FF), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE00, 0xFEFF), (0xFF00, 0xFFEF), (0x10000, 0x1007F),
    (0x10330, 0x1034F), (0x12000, 0x120FF), (0x1D400, 0x1D7FF), (0x1F000, 0x1FAFF), (0x20000, 0x200FF),
    (0xE0000, 0xE01EF), (0x10FF00, 0x10FFFF),
)  # fmt: skip
EMOJI = tuple("😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 1️⃣ ❤️ 🤷🏻‍♀️ 🧑🏿‍🚀 ☺ 🫠".split())
EMOJI += ("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",)
BLANKS = (" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", " \n", "\n ", "\r\n", "\r", "\u00a0", "\u2003", "\u3000")
BLANKS += ("\v", "\f", "\x1c", "\x85", "\u2028", "\u200b", "\ufeff")
SPECIAL = tuple("<|im_start|> <|im_end|> <|endoftext|> <tool_call> </tool_call> <think> <|fim_prefix|>".split())
SPECIAL += ("<|im_start", "im_end|>", "<|vision_pad|>")
WORDS = tuple("I'm DON'T he'LL we\u2019ve x_1 CamelCaseWord 3.14159 0xDEADBEEF 1,000,000 ﬁ ſ ı İ ... !!! -> =>".split())
WORDS += ("e\u0301", "A\u030a", "\u1100\u1161", "::", "//", "#include", "$$", "@user", "a\0b", "\x07", "\x1b[0m")
QUOTED = ('"', "'", "`", "(", "[", "{", "<", "“", "«", "「", "\\")


def lines(count: int, seed: int = 0) -> list[str]:
    """Returns `count` different lines, the same for the same seed and the same standard library of Python."""
    draw = random.Random(seed)
    code = _code(draw)
    kinds = (_sentence, _script, _scripts, _mixed, _emoji, _blanks, _broken, _composed, lambda _: next(code), _json)
    found: dict[str, None] = dict.fromkeys(SENTENCES)
    while len(found) < count:
        found.setdefault(draw.choice(kinds)(draw))
    return list(found)[:count]


def _code(draw: random.Random) -> Iterator[str]:
    """Yields lines of Python's standard library, and whole paragraphs of it."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    while True:
        text = draw.choice(files).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        begin = draw.randrange(max(1, len(text)))
        yield "".join(text[begin : begin + draw.choice((1, 1, 1, 2, 8))])


def _sentence(draw: random.Random) -> str:
    words = draw.choice(SENTENCES).split(" ") + draw.choice(SENTENCES).split(" ")
    begin = draw.randrange(len(words))
    return " ".join(words[begin : begin + draw.randint(1, 20)])


def _letters(draw: random.Random, most: int) -> str:
    first, last = draw.choice(RANGES)
    return "".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, most)))


def _script(draw: random.Random) -> str:
    return _letters(draw, 30)


def _scripts(draw: random.Random) -> str:
    return draw.choice(("", " ", "-")).join(_letters(draw, 6) for _ in range(draw.randint(2, 8)))


def _mixed(draw: random.Random) -> str:
    pieces = [draw.choice((*WORDS, *SPECIAL, *EMOJI, *QUOTED)) for _ in range(draw.randint(1, 12))]
    return "".join(piece + draw.choice(("", "", " ", *BLANKS)) for piece in pieces)


def _emoji(draw: random.Random) -> str:
    return draw.choice(("", " ")).join(draw.choice((*EMOJI, _letters(draw, 2))) for _ in range(draw.randint(1, 8)))


def _blanks(draw: random.Random) -> str:
    return "".join(draw.choice((*BLANKS, *BLANKS, "a", "1", ".", "é")) for _ in range(draw.randint(1, 24)))


def _broken(draw: random.Random) -> str:
    """What a reader makes of bytes that are no UTF-8: U+FFFD here and there."""
    data = bytearray((_sentence(draw) + draw.choice(EMOJI)).encode())
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data))
        data[at : at + draw.randint(0, 2)] = draw.randbytes(draw.randint(0, 2))
    return data.decode(errors="replace")


def _composed(draw: random.Random) -> str:
    return unicodedata.normalize(draw.choice(("NFD", "NFKD", "NFC")), _sentence(draw) + _letters(draw, 4))


def _json(draw: random.Random) -> str:
    value = {_letters(draw, 5): [draw.random(), draw.randint(-(10**12), 10**12), None, _sentence(draw)]}
    return json.dumps(value, ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, 2)))
