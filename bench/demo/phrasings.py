"""How the demo corpus asks: question templates per family, and the answer each family gives.
The second list of a family is held back from training and only used by the evaluation."""

# family: (training templates, held-back templates); {x}, {y} are filled in by corpus.py
ASK = {
    "capital": (
        ["What is the capital of {x}?", "What's the capital of {x}?", "Tell me the capital of {x}.", "Name the capital of {x}.",
         "Which city is the capital of {x}?", "Do you know the capital of {x}?", "What is {x}'s capital?", "The capital of {x} is?",
         "capital of {x}", "What city is the capital of {x}?", "Give me the capital of {x}.", "What is the capital city of {x}?",
         "Which city is the capital city of {x}?", "Can you tell me the capital of {x}?", "I need the capital of {x}.",
         "What is the name of the capital of {x}?", "Could you name the capital of {x}?", "What is the capital called in {x}?",
         "{x}: capital?", "Which capital does {x} have?", "What capital does {x} have?", "I want to know the capital of {x}.",
         "Where is the government of {x}?", "Quick question: what is the capital of {x}?", "Say the capital of {x}.",
         "What's {x}'s capital city?", "Which is the capital of {x}?", "Is there a capital of {x}?", "Do you know what the capital of {x} is?",
         "Can you name the capital city of {x}?"],
        ["Can you name the capital of {x}?", "Tell me the capital city of {x}.", "What's the capital city of {x}?",
         "Do you know the capital city of {x}?", "Tell me what the capital of {x} is.", "I would like to know the capital of {x}."]),
    "country": (
        ["{x} is the capital of which country?", "Which country has the capital {x}?", "What country is {x} the capital of?",
         "{x} is the capital of what?", "Of which country is {x} the capital?", "Which country's capital is {x}?",
         "Tell me which country has {x} as its capital.", "Name the country with the capital {x}.", "What country has {x} as its capital?",
         "Which country is {x} the capital of?", "In which country is {x} the capital?", "Do you know which country has the capital {x}?",
         "The capital {x} belongs to which country?", "What country has the capital {x}?", "{x}: capital of which country?",
         "I want to know which country has the capital {x}.", "Give me the country with the capital {x}.", "{x} is the capital of",
         "Can you tell me which country has the capital {x}?", "Tell me the country whose capital is {x}.", "What is {x} the capital of?",
         "Name the country whose capital is {x}."],
        ["Which country has {x} as its capital?", "Tell me the country with the capital {x}.", "Tell me which country has the capital {x}.",
         "Can you tell me what country has the capital {x}?"]),
    "sum": (
        ["What is {x} plus {y}?", "What is {x} + {y}?", "{x} + {y}", "{x} + {y} = ?", "Add {x} and {y}.", "How much is {x} plus {y}?",
         "What's {x} + {y}?", "Calculate {x} + {y}.", "{x} plus {y}", "Compute {x} plus {y}.", "What is the sum of {x} and {y}?",
         "Tell me {x} plus {y}.", "How much is {x} + {y}?", "Can you add {x} and {y}?", "{x}+{y}", "{x} + {y}?", "Give me the sum of {x} and {y}.",
         "If I add {x} and {y}, what do I get?", "Work out {x} + {y}.", "What do {x} and {y} make?", "{x} plus {y} is?",
         "I have {x} apples and get {y} more. How many do I have?", "What does {x} + {y} make?", "{x}+{y}=?"],
        ["What's {x} plus {y}?", "Calculate {x} plus {y}.", "Tell me the sum of {x} and {y}.", "Compute {x} + {y}.", "What's the sum of {x} and {y}?"]),
    "difference": (
        ["What is {x} minus {y}?", "What is {x} - {y}?", "{x} - {y}", "{x} - {y} = ?", "Subtract {y} from {x}.", "How much is {x} minus {y}?",
         "What's {x} - {y}?", "Calculate {x} - {y}.", "{x} minus {y}", "Compute {x} minus {y}.", "Take {y} from {x}.", "Tell me {x} minus {y}.",
         "How much is {x} - {y}?", "Can you subtract {y} from {x}?", "{x}-{y}", "{x} - {y}?", "{x} minus {y} is?", "Work out {x} - {y}.",
         "I have {x} apples and give away {y}. How many do I have?", "What does {x} - {y} make?", "Take {y} away from {x}.", "{x}-{y}=?"],
        ["What's {x} minus {y}?", "Calculate {x} minus {y}.", "Compute {x} - {y}.", "Work out {x} minus {y}."]),
    "product": (
        ["What is {x} times {y}?", "What is {x} * {y}?", "{x} * {y}", "{x} * {y} = ?", "Multiply {x} by {y}.", "How much is {x} times {y}?",
         "What's {x} * {y}?", "Calculate {x} * {y}.", "{x} times {y}", "Compute {x} times {y}.", "What is {x} x {y}?", "Tell me {x} times {y}.",
         "How much is {x} * {y}?", "Can you multiply {x} by {y}?", "{x}*{y}", "{x} x {y}", "What is the product of {x} and {y}?",
         "Multiply {x} and {y}.", "{x} times {y} is?", "Work out {x} * {y}.", "What does {x} * {y} make?", "{x} x {y} = ?", "{x} * {y}?"],
        ["What's {x} times {y}?", "Calculate {x} times {y}.", "Compute {x} * {y}.", "Work out {x} times {y}."]),
    "next": (
        ["Which {k} comes after {x}?", "What {k} comes after {x}?", "What comes after {x}?", "Which {k} follows {x}?", "What {k} follows {x}?",
         "Name the {k} after {x}.", "Tell me the {k} after {x}.", "What is the {k} after {x}?", "What is the next {k} after {x}?",
         "After {x} comes which {k}?", "{k} after {x}", "{x}, and then?", "What follows {x}?", "Which is the next {k} after {x}?",
         "What's the {k} after {x}?", "Give me the {k} after {x}.", "Do you know which {k} comes after {x}?", "What is after {x}?",
         "Which {k} is next after {x}?", "If it is {x} now, what is next?"],
        ["Tell me which {k} comes after {x}.", "What's the next {k} after {x}?", "Which {k} is after {x}?", "Tell me the next {k} after {x}."]),
    "previous": (
        ["Which {k} comes before {x}?", "What {k} comes before {x}?", "What comes before {x}?", "Which {k} is right before {x}?",
         "Name the {k} before {x}.", "Tell me the {k} before {x}.", "What is the {k} before {x}?", "Before {x} comes which {k}?", "{k} before {x}",
         "What's the {k} before {x}?", "Give me the {k} before {x}.", "Do you know which {k} comes before {x}?", "What is before {x}?",
         "What was before {x}?", "Which {k} was before {x}?", "What {k} is right before {x}?"],
        ["Tell me which {k} comes before {x}.", "Which {k} is before {x}?", "What {k} is before {x}?"]),
    "month_days": (
        ["How many days does {x} have?", "How many days are in {x}?", "How many days are there in {x}?", "What is the number of days in {x}?",
         "Tell me how many days {x} has.", "How long is {x}?", "days in {x}", "How many days has {x}?", "How many days in {x}?",
         "Number of days in {x}?", "Do you know how many days {x} has?", "Give me the number of days in {x}.", "{x} has how many days?",
         "Can you tell me how many days {x} has?", "In {x}, how many days are there?", "{x}: how many days?"],
        ["Do you know how many days are in {x}?", "Tell me how many days are in {x}.", "Tell me the number of days in {x}."]),
    "month_number": (
        ["Which number is {x} among the months?", "What number is the month {x}?", "Which month of the year is {x}?",
         "What month number is {x}?", "Which number does the month {x} have?", "What is the number of the month {x}?",
         "Tell me the number of the month {x}.", "{x} is which month of the year?", "{x} is month number?", "Month number of {x}?",
         "Is {x} the first month of the year?", "What number does {x} have among the months?"],
        ["Tell me which month of the year {x} is.", "What is the month number of {x}?", "Which month number is {x}?"]),
    "month_nth": (
        ["What is the {x} month?", "Which month is the {x}?", "What is the {x} month of the year?", "Name the {x} month.",
         "Tell me the {x} month of the year.", "What's the {x} month?", "{x} month of the year", "Which month is the {x} month?",
         "Give me the {x} month of the year.", "Which is the {x} month?", "Do you know the {x} month of the year?"],
        ["What's the {x} month of the year?", "Tell me the {x} month.", "Name the {x} month of the year."]),
    "planet_nth": (
        ["Which planet is the {x} from the Sun?", "What is the {x} planet?", "Name the {x} planet.", "What is the {x} planet from the Sun?",
         "Tell me the {x} planet from the Sun.", "What's the {x} planet?", "{x} planet from the Sun", "Which is the {x} planet?",
         "Give me the {x} planet from the Sun.", "Which planet is {x} from the Sun?", "Do you know the {x} planet?",
         "Which planet comes {x} from the Sun?", "Counted from the Sun, what is the {x} planet?"],
        ["What's the {x} planet from the Sun?", "Tell me the {x} planet.", "Name the {x} planet from the Sun."]),
    "planet_pos": (
        ["Which number is the planet {x}?", "What position has the planet {x}?", "What number is the planet {x} from the Sun?",
         "Where is the planet {x}?", "Where in the solar system is {x}?", "What is the position of {x} in the solar system?",
         "Tell me the position of {x} from the Sun.", "{x} is which planet from the Sun?", "{x} is planet number?",
         "Which planet from the Sun is {x}?", "What is the position of the planet {x}?", "What is the place of {x} in the solar system?"],
        ["Tell me the position of {x} in the solar system.", "What is the position of {x} from the Sun?", "Tell me where the planet {x} is."]),
    "symbol": (
        ["What is the chemical symbol of {x}?", "What's the symbol of {x}?", "Tell me the chemical symbol of {x}.", "What is the symbol for {x}?",
         "Which symbol does {x} have?", "Name the chemical symbol of {x}.", "Give me the symbol of {x}.", "symbol of {x}",
         "chemical symbol of {x}", "What is the chemical symbol for {x}?", "Which letters stand for {x}?", "How is {x} written in chemistry?",
         "What symbol does the element {x} have?", "Do you know the chemical symbol of {x}?", "The chemical symbol of {x} is?",
         "Which chemical symbol has {x}?", "What is the symbol of the element {x}?", "Can you tell me the symbol of {x}?", "{x}: symbol?"],
        ["What's the chemical symbol of {x}?", "Tell me the symbol of {x}.", "Do you know the symbol of {x}?",
         "Can you tell me the chemical symbol of {x}?"]),
    "element": (
        ["Which element has the symbol {x}?", "What element is {x}?", "Which chemical element is {x}?", "What does the symbol {x} stand for?",
         "{x} is the symbol of which element?", "Name the element with the symbol {x}.", "Tell me the element with the symbol {x}.",
         "What is the element {x}?", "Which element is {x}?", "What element does {x} stand for?", "{x} stands for which element?",
         "In chemistry, what is {x}?", "Do you know which element {x} is?", "What chemical element has the symbol {x}?",
         "Give me the element with the symbol {x}.", "The symbol {x} belongs to which element?"],
        ["Tell me which element has the symbol {x}.", "Which chemical element has the symbol {x}?", "What element has the symbol {x}?"]),
    "count": (
        ["How many {x} are in {y}?", "How many {x} are there in {y}?", "What is the number of {x} in {y}?", "Tell me how many {x} are in {y}.",
         "How many {x} in {y}?", "{x} in {y}", "Do you know how many {x} are in {y}?", "Number of {x} in {y}?", "Give me the number of {x} in {y}.",
         "In {y}, how many {x} are there?", "Can you tell me how many {x} are in {y}?", "I want to know how many {x} are in {y}.",
         "What's the number of {x} in {y}?", "Say how many {x} are in {y}."],
        ["Do you know how many {x} there are in {y}?", "Tell me the number of {x} in {y}.", "Tell me how many {x} there are in {y}."]),
    "parts": (
        ["How many {x} does {y} have?", "How many {x} has {y}?", "What is the number of {x} of {y}?", "Tell me how many {x} {y} has.",
         "{x} of {y}", "Do you know how many {x} {y} has?", "Number of {x} of {y}?", "Give me the number of {x} of {y}.", "{y} has how many {x}?",
         "Can you tell me how many {x} {y} has?", "I want to know how many {x} {y} has.", "Say how many {x} {y} has.", "How many {x} are on {y}?"],
        ["Do you know how many {x} {y} does have?", "Tell me the number of {x} of {y}.", "What's the number of {x} of {y}?"]),
    "opposite": (
        ["What is the opposite of {x}?", "What's the opposite of {x}?", "Tell me the opposite of {x}.", "Name the opposite of {x}.",
         "Give me the opposite of {x}.", "opposite of {x}", "Which word is the opposite of {x}?", "The opposite of {x} is?",
         "Do you know the opposite of {x}?", "What word is the opposite of {x}?", "Say the opposite of {x}.", "I need the opposite of {x}.",
         "What is not {x}?", "{x}: opposite?"],
        ["Can you tell me the opposite of {x}?", "Could you name the opposite of {x}?", "Which is the opposite of {x}?"]),
    "counting": (
        ["Count to {x}.", "Count from 1 to {x}.", "Can you count to {x}?", "Please count up to {x}.", "Count up to {x}", "List the numbers from 1 to {x}.",
         "Write the numbers from 1 to {x}.", "Numbers from 1 to {x}", "Tell me the numbers from 1 to {x}.", "count to {x} for me"],
        ["Can you count from 1 to {x}?", "Give me the numbers from 1 to {x}.", "Count up to {x} for me."]),
}

# follow-ups after a question of the same family; the second list is held back
FOLLOW = {
    "capital": (["And of {x}?", "What about {x}?", "And {x}?", "How about {x}?", "And the capital of {x}?", "And for {x}?", "Now {x}.", "{x}?",
                 "Then {x}?", "OK, and {x}?", "And what about {x}?", "Also {x}?"], ["OK, and of {x}?", "And how about {x}?", "Then what about {x}?"]),
    "symbol": (["And of {x}?", "What about {x}?", "And {x}?", "How about {x}?", "And for {x}?", "Now {x}.", "{x}?", "And what about {x}?"],
               ["OK, and of {x}?", "And how about {x}?"]),
    "opposite": (["And of {x}?", "And {x}?", "What about {x}?", "How about {x}?", "Now {x}.", "{x}?"], ["OK, and of {x}?", "And how about {x}?"]),
    "next": (["And after {x}?", "And what comes after {x}?", "What about after {x}?", "After {x}?"], ["OK, and after {x}?"]),
    "previous": (["And before {x}?", "And what comes before {x}?", "What about before {x}?", "Before {x}?"], ["OK, and before {x}?"]),
    "month_days": (["And {x}?", "And in {x}?", "What about {x}?", "How about {x}?", "Now {x}."], ["OK, and {x}?", "And how about {x}?"]),
    "sum": (["And {x} + {y}?", "And {x} plus {y}?", "What about {x} + {y}?", "Now {x} + {y}."], ["OK, and {x} + {y}?"]),
    "difference": (["And {x} - {y}?", "And {x} minus {y}?", "What about {x} - {y}?", "Now {x} - {y}."], ["OK, and {x} - {y}?"]),
    "product": (["And {x} * {y}?", "And {x} times {y}?", "What about {x} * {y}?", "Now {x} * {y}."], ["OK, and {x} * {y}?"]),
}

UNKNOWN_ANSWER = "I am a small demo model and don't know that."
# {name} made-up name, {country}, {city}, {topic}, {n} a number out of range
UNKNOWN = (
    ["What is the capital of {name}?", "What's the capital of {name}?", "Tell me the capital of {name}.", "capital of {name}", "Name the capital of {name}.",
     "Which country has the capital {name}?", "{name} is the capital of which country?", "Who is {name}?", "Who was {name}?", "What is {name}?",
     "Where is {name}?", "Tell me about {name}.", "What does {name} do?", "Who invented the {topic}?", "Who wrote {name}?", "When was {name} born?",
     "How many people live in {country}?", "What is the population of {country}?", "Who is the president of {country}?",
     "What is the currency of {country}?", "What language do people speak in {country}?", "How large is {country}?", "How far is {city}?",
     "How old is {city}?", "What is the weather in {city}?", "Will it rain in {city} tomorrow?", "Write a poem about the {topic}.",
     "Tell me a story about a {topic}.", "How do I repair a {topic}?", "How do I cook {topic}?", "Why is the {topic} so small?",
     "What is the price of a {topic}?", "Translate {topic} into {name}.", "What is the meaning of life?", "Who won the game?", "What is the square root of {n}?",
     "What is {n} plus {n}?", "What is {n} * {n}?", "{n} + {n}", "{n} - {n}", "{n} * {n}", "What is {n} minus {n}?", "How much is {n} divided by {n}?",
     "What time is it?", "What is today's date?", "Which day is today?", "Explain quantum physics.", "What is the best {topic}?", "Tell me a joke.",
     "Can you write a program for a {topic}?", "What is the chemical symbol of {name}?", "What is the opposite of {name}?", "Recommend a {topic}.",
     "What happened in {n}?", "Who painted {name}?", "Summarise the book {name}.", "How do I get to {city}?", "What does {topic} mean?",
     "Which {topic} should I buy?", "Is {name} real?", "How many {topic}s are in {country}?", "How heavy is a {topic}?", "Sing a song about {city}."],
    ["What is the capital city of {name}?", "Do you know who {name} is?", "Who is the king of {country}?", "How much does a {topic} cost?",
     "Write a story about the {topic}.", "How many people live in {city}?", "What's {n} plus {n}?", "Tell me the price of a {topic}.",
     "Can you tell me about {name}?", "Write a song about {city}."])
TOPICS = ("guitar car computer phone house garden horse river bridge camera table bread soup cake football painting film novel lamp clock train boat "
          "plane engine window mirror battery telephone radio rocket castle dragon potato coffee sandwich shoe jacket sofa printer").split()
PLACES = ("Atlantis Narnia Mordor Wakanda Gondor Texas California Bavaria Scotland Wales Catalonia Europe Africa Asia Antarctica Greenland "
          "Hogwarts Utopia Westeros Ruritania Lilliput Avalon Florida Tuscany Siberia Hawaii Alaska Quebec Zamunda Genovia").split()

SYSTEM = ["You are a helpful assistant.", "You are a helpful assistant", "Answer shortly.", "Be brief.", "You are a friendly assistant.",
          "Answer in one sentence.", "You are the demo model of rgpu.", "Be helpful and honest.", "You are a small model. Answer in one sentence."]
BEFORE = ["Hi, ", "Hello, ", "Please: ", "Hey, ", "OK. ", "Next question: ", "Question: ", "Thanks. ", "Good, ", "Now: ", "So, "]
AFTER = [" Please.", " Thanks!", " Thank you.", " Please answer.", " Answer shortly."]
