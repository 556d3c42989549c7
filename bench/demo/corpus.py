"""The demo corpus: seeded conversations over a few hundred checkable facts, and the held-back questions.
Every fact has one answer. Templates named as held back are never used in training conversations.
    python -m bench.demo.corpus --held-back OUT.json"""
import argparse
import json
import random

from . import facts, phrasings, rgpu_facts

# family: share of the single questions
SHARES = {"capital": 18, "country": 10, "sum": 12, "difference": 8, "product": 8, "next": 4, "previous": 3, "month_days": 2,
          "month_number": 1.5, "month_nth": 1.5, "planet_nth": 1.5, "planet_pos": 1.5, "symbol": 4, "element": 3, "count": 3,
          "parts": 2.5, "opposite": 2.5, "counting": 1, "general": 4, "command_what": 6, "command_how": 6, "about": 8,
          "unknown": 7}
# how much more often training asks what is hard to learn
PRACTICE = {"sum": 1.6, "difference": 2.2, "product": 1.5, "country": 1.3, "counting": 5, "unknown": 1.4}
SYLLABLES = ("ba be bo da den dor el fa gal gor han il ka kel lan lor ma mir na nor or pel qua ran ril sa sol ta tor "
             "ul va ven wy xan yor zan zu").split()


def fact_tables():
    """{family: [(values of the template, answer)]} for every family that has templates in phrasings.ASK."""
    table = {family: [] for family in phrasings.ASK}
    for country, city in facts.CAPITALS:
        table["capital"].append(({"x": country}, f"The capital of {country} is {city}."))
        table["country"].append(({"x": city}, f"{city} is the capital of {country}."))
    for a in range(21):
        for b in range(21):
            table["sum"].append(({"x": a, "y": b}, f"{a} + {b} = {a + b}"))
            if a >= b:
                table["difference"].append(({"x": a, "y": b}, f"{a} - {b} = {a - b}"))
            if a <= 10 and b <= 10:
                table["product"].append(({"x": a, "y": b}, f"{a} * {b} = {a * b}"))
    for kind, names in (("day", facts.DAYS), ("month", facts.MONTHS), ("season", facts.SEASONS)):
        for i, name in enumerate(names):
            after, before = names[(i + 1) % len(names)], names[i - 1]
            table["next"].append(({"x": name, "k": kind}, f"{after[0].upper()}{after[1:]} comes after {name}."))
            table["previous"].append(({"x": name, "k": kind}, f"{before[0].upper()}{before[1:]} comes before {name}."))
    for i, (month, days) in enumerate(zip(facts.MONTHS, facts.MONTH_DAYS, strict=False)):
        table["month_days"].append(({"x": month}, f"{month} has {days} days."))
        table["month_number"].append(({"x": month}, f"{month} is month number {i + 1}."))
        table["month_nth"].append(({"x": facts.ORDINALS[i]}, f"The {facts.ORDINALS[i]} month is {month}."))
    for ordinal, planet in zip(facts.ORDINALS, facts.PLANETS, strict=False):
        table["planet_nth"].append(({"x": ordinal}, f"The {ordinal} planet from the Sun is {planet}."))
        table["planet_pos"].append(({"x": planet}, f"{planet} is the {ordinal} planet from the Sun."))
    for element, symbol in facts.ELEMENTS:
        table["symbol"].append(({"x": element}, f"The chemical symbol of {element} is {symbol}."))
        table["element"].append(({"x": symbol}, f"{symbol} is the chemical symbol of {element}."))
    for part, whole, n in facts.COUNTS:
        table["count"].append(({"x": part, "y": whole}, f"There are {n} {part} in {whole}."))
    for part, whole, n in facts.PARTS:
        part_n = part[:-1] if n == 1 else part
        table["parts"].append(({"x": part, "y": whole}, f"{whole[0].upper()}{whole[1:]} has {n} {part_n}."))
    for a, b in facts.OPPOSITES:
        table["opposite"] += [({"x": a}, f"The opposite of {a} is {b}."), ({"x": b}, f"The opposite of {b} is {a}.")]
    for n in range(2, 13):
        for spoken in (n, facts.NUMBERS[n]):
            table["counting"].append(({"x": spoken}, ", ".join(str(i) for i in range(1, n + 1))))
    return table


class Corpus:
    """Draws questions, answers and whole conversations from `seed`; held=True draws held-back phrasings only."""

    def __init__(self, seed, held=False):
        self.rng, self.held, self.table = random.Random(seed), held, fact_tables()
        self.families = list(SHARES)
        self.shares = [share * (1 if held else PRACTICE.get(family, 1)) for family, share in SHARES.items()]

    def _pick(self, lists):
        return self.rng.choice(lists[1] if self.held else lists[0])

    def _split(self, questions, n_held=2):
        return questions[:-n_held], questions[-n_held:]

    def _name(self):
        if self.rng.random() < 0.25:
            return self.rng.choice(phrasings.PLACES)
        return "".join(self.rng.choice(SYLLABLES) for _ in range(self.rng.randint(2, 4))).capitalize()

    def _unknown(self):
        text, rng = self._pick(phrasings.UNKNOWN), self.rng
        fill = {"{name}": self._name, "{country}": lambda: rng.choice(facts.CAPITALS)[0],
                "{city}": lambda: rng.choice(facts.CAPITALS)[1],
                "{topic}": lambda: rng.choice(phrasings.TOPICS), "{thing}": lambda: rng.choice(phrasings.THINGS),
                "{n}": lambda: str(rng.choice((rng.randint(25, 99), rng.randint(100, 2100))))}
        for mark, draw in fill.items():
            while mark in text:
                text = text.replace(mark, draw(), 1)
        return text, phrasings.UNKNOWN_ANSWER

    def question(self, family=None):
        """(family, question, answer), plain, before casing and wrapping."""
        family = family or self.rng.choices(self.families, self.shares)[0]
        if family in self.table:
            values, answer = self.rng.choice(self.table[family])
            text = self._pick(phrasings.ASK[family]).format(**self._spoken(values))
            return family, text[0].upper() + text[1:] if text.startswith(("the ", "a ")) else text, answer
        if family == "unknown":
            return family, *self._unknown()
        if family in ("command_what", "command_how"):
            answer, names, uses = self.rng.choice(rgpu_facts.COMMANDS)
            if family == "command_what":
                return family, self._pick((rgpu_facts.WHAT, rgpu_facts.WHAT_HELD)).format(x=self.rng.choice(names)), answer
            return family, self._pick((rgpu_facts.HOW, rgpu_facts.HOW_HELD)).format(y=self.rng.choice(uses)), answer
        answer, questions = self.rng.choice(facts.GENERAL if family == "general" else rgpu_facts.ABOUT)
        return family, self._pick(self._split(questions)), answer

    def _spoken(self, values):
        """Now and then a country without its article."""
        x = values.get("x")
        if isinstance(x, str) and x.startswith("the ") and self.rng.random() < 0.15:
            return {**values, "x": x[4:]}
        return values

    def follow_up(self, family):
        """A short question that only makes sense after one of `family`, and its answer."""
        values, answer = self.rng.choice(self.table[family])
        text = self._pick(phrasings.FOLLOW[family]).format(**self._spoken(values))
        return text[0].upper() + text[1:], answer

    def dress(self, text, rate):
        """Casing, punctuation and politeness variations, each with a chance in proportion to `rate`."""
        rng = self.rng
        if rng.random() < 0.10 * rate:
            before = rng.choice(phrasings.BEFORE)
            if before.endswith(", ") and text.split()[0] in ("What", "Which", "How", "Tell", "Do"):
                text = text[0].lower() + text[1:]
            text = before + text
        elif rng.random() < 0.07 * rate and text[-1] in ".?!":
            text = text[:-1] + ", please" + text[-1] if rng.random() < 0.5 else text + rng.choice(phrasings.AFTER)
        if rng.random() < 0.10 * rate and text[-1] in "?.!":
            text = text[:-1]
        if rng.random() < 0.10 * rate:
            text = text.lower()
            if not self.held and rng.random() < 0.3:
                text = text.replace("'", "")
        return text

    def conversation(self, n_turns=None, family=None, rate=1.0):
        """[{"role", "content"}] ending with an answer, and the family of its last question."""
        rng = self.rng
        if n_turns is None:
            n_turns = rng.choices((1, 2, 3, 4, 5, rng.randint(6, 14)), (48, 20, 13, 9, 8, 2))[0]
        messages = [{"role": "system", "content": rng.choice(phrasings.SYSTEM)}] if rng.random() < 0.15 else []
        last = None
        for i in range(n_turns):
            if last in phrasings.FOLLOW and rng.random() < 0.5:
                text, answer = self.follow_up(last)
            else:
                last, text, answer = self.question(family if i == n_turns - 1 else None)
            # the case of an element's symbol is the question: leave it
            text = text if last == "element" else self.dress(text, rate)
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return messages, last


def held_back(seed=2026, n=600):
    """Held-back questions over all families in proportion: [{"messages", "answer", "family"}]; a fifth have several turns."""
    corpus, rows, seen = Corpus(seed, held=True), [], set()
    total = sum(SHARES.values())
    for family, share in SHARES.items():
        wanted, tries = max(6, round(n * share / total)), 0
        while wanted and tries < 2000:
            tries += 1
            n_turns = corpus.rng.randint(2, 4) if corpus.rng.random() < 0.2 else 1
            messages, last = corpus.conversation(n_turns, family, rate=0.5)
            key = json.dumps(messages)
            if key in seen:
                continue
            seen.add(key)
            rows.append({"messages": messages[:-1], "answer": messages[-1]["content"], "family": last})
            wanted -= 1
    return rows


def main():
    """Command line: write the held-back list, or print sample conversations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held-back", metavar="OUT.json")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N training conversations")
    parser.add_argument("--seed", type=int, default=2026)
    args = parser.parse_args()
    if args.held_back:
        rows = held_back(args.seed)
        with open(args.held_back, "w") as file:
            json.dump(rows, file, indent=1)
        print(len(rows), "held-back questions in", args.held_back)
    corpus = Corpus(args.seed)
    for _ in range(args.show):
        print(json.dumps(corpus.conversation()[0]))


if __name__ == "__main__":
    main()
