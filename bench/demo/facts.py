"""The data of the demo corpus: countries, elements, planets, calendar, small closed sets and facts about rgpu.
Tables only; corpus.py turns them into questions and answers."""

# (country as it stands in a sentence, capital in ASCII)
CAPITALS = [pair.split(":") for pair in (
    "France:Paris|Germany:Berlin|Italy:Rome|Spain:Madrid|Portugal:Lisbon|the United Kingdom:London|Ireland:Dublin|"
    "Belgium:Brussels|the Netherlands:Amsterdam|Luxembourg:Luxembourg|Switzerland:Bern|Austria:Vienna|Poland:Warsaw|"
    "the Czech Republic:Prague|Slovakia:Bratislava|Hungary:Budapest|Slovenia:Ljubljana|Croatia:Zagreb|"
    "Serbia:Belgrade|Bosnia and Herzegovina:Sarajevo|Montenegro:Podgorica|Albania:Tirana|North Macedonia:Skopje|"
    "Greece:Athens|Bulgaria:Sofia|Romania:Bucharest|Moldova:Chisinau|Ukraine:Kyiv|Belarus:Minsk|Lithuania:Vilnius|"
    "Latvia:Riga|Estonia:Tallinn|Finland:Helsinki|Sweden:Stockholm|Norway:Oslo|Denmark:Copenhagen|Iceland:Reykjavik|"
    "Malta:Valletta|Cyprus:Nicosia|Russia:Moscow|Turkey:Ankara|Georgia:Tbilisi|Armenia:Yerevan|Azerbaijan:Baku|"
    "Iran:Tehran|Iraq:Baghdad|Syria:Damascus|Lebanon:Beirut|Jordan:Amman|Saudi Arabia:Riyadh|Yemen:Sanaa|Oman:Muscat|"
    "the United Arab Emirates:Abu Dhabi|Qatar:Doha|Bahrain:Manama|Kuwait:Kuwait City|Kazakhstan:Astana|"
    "Uzbekistan:Tashkent|Turkmenistan:Ashgabat|Kyrgyzstan:Bishkek|Tajikistan:Dushanbe|Afghanistan:Kabul|"
    "Pakistan:Islamabad|India:New Delhi|Nepal:Kathmandu|Bhutan:Thimphu|Bangladesh:Dhaka|the Maldives:Male|"
    "Thailand:Bangkok|Laos:Vientiane|Cambodia:Phnom Penh|Vietnam:Hanoi|Malaysia:Kuala Lumpur|Singapore:Singapore|"
    "the Philippines:Manila|China:Beijing|Mongolia:Ulaanbaatar|North Korea:Pyongyang|South Korea:Seoul|Japan:Tokyo|"
    "Australia:Canberra|New Zealand:Wellington|Fiji:Suva|Papua New Guinea:Port Moresby|Samoa:Apia|Egypt:Cairo|"
    "Libya:Tripoli|Tunisia:Tunis|Algeria:Algiers|Morocco:Rabat|Mauritania:Nouakchott|Senegal:Dakar|Mali:Bamako|"
    "Niger:Niamey|Chad:N'Djamena|Sudan:Khartoum|Ethiopia:Addis Ababa|Eritrea:Asmara|Somalia:Mogadishu|Kenya:Nairobi|"
    "Uganda:Kampala|Rwanda:Kigali|Tanzania:Dodoma|Mozambique:Maputo|Madagascar:Antananarivo|Zambia:Lusaka|"
    "Zimbabwe:Harare|Botswana:Gaborone|Namibia:Windhoek|Angola:Luanda|Gabon:Libreville|Cameroon:Yaounde|"
    "Nigeria:Abuja|Ghana:Accra|Togo:Lome|Liberia:Monrovia|Sierra Leone:Freetown|Guinea:Conakry|Canada:Ottawa|"
    "the United States:Washington, D.C.|Mexico:Mexico City|Guatemala:Guatemala City|Honduras:Tegucigalpa|"
    "El Salvador:San Salvador|Nicaragua:Managua|Costa Rica:San Jose|Panama:Panama City|Cuba:Havana|Jamaica:Kingston|"
    "Haiti:Port-au-Prince|the Dominican Republic:Santo Domingo|the Bahamas:Nassau|Colombia:Bogota|Venezuela:Caracas|"
    "Ecuador:Quito|Peru:Lima|Brazil:Brasilia|Paraguay:Asuncion|Uruguay:Montevideo|Argentina:Buenos Aires|"
    "Chile:Santiago|Guyana:Georgetown"
).split("|")]

ELEMENTS = [pair.split(":") for pair in (
    "hydrogen:H|helium:He|lithium:Li|carbon:C|nitrogen:N|oxygen:O|fluorine:F|neon:Ne|sodium:Na|magnesium:Mg|"
    "aluminium:Al|silicon:Si|phosphorus:P|sulfur:S|chlorine:Cl|argon:Ar|potassium:K|calcium:Ca|titanium:Ti|iron:Fe|"
    "nickel:Ni|copper:Cu|zinc:Zn|silver:Ag|tin:Sn|iodine:I|platinum:Pt|gold:Au|mercury:Hg|lead:Pb|uranium:U"
).split("|")]

PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
MONTH_DAYS = ["31", "28 or 29", "31", "30", "31", "30", "31", "31", "30", "31", "30", "31"]
SEASONS = "spring summer autumn winter".split()

# how many PARTS are in WHOLE
COUNTS = [("days", "a week", 7), ("hours", "a day", 24), ("minutes", "an hour", 60), ("seconds", "a minute", 60),
          ("months", "a year", 12), ("weeks", "a year", 52), ("days", "a normal year", 365), ("days", "a leap year", 366),
          ("years", "a century", 100), ("years", "a decade", 10), ("seasons", "a year", 4), ("items", "a dozen", 12),
          ("centimetres", "a metre", 100), ("metres", "a kilometre", 1000), ("grams", "a kilogram", 1000),
          ("millimetres", "a centimetre", 10), ("bits", "a byte", 8), ("letters", "the English alphabet", 26),
          ("planets", "the solar system", 8), ("quarters", "a year", 4), ("squares", "a chess board", 64),
          ("players", "a football team", 11), ("strings", "a violin", 4), ("colours", "a rainbow", 7),
          ("continents", "the world", 7)]

# how many PARTS does WHOLE have
PARTS = [("sides", "a triangle", 3), ("sides", "a square", 4), ("sides", "a pentagon", 5), ("sides", "a hexagon", 6),
         ("sides", "an octagon", 8), ("faces", "a cube", 6), ("legs", "a spider", 8), ("legs", "an insect", 6),
         ("legs", "a dog", 4), ("legs", "a cat", 4), ("legs", "a bird", 2), ("arms", "an octopus", 8),
         ("wheels", "a bicycle", 2), ("wheels", "a tricycle", 3), ("wheels", "a car", 4), ("fingers", "a hand", 5),
         ("moons", "Earth", 1)]

OPPOSITES = [pair.split(":") for pair in (
    "hot:cold|big:small|fast:slow|up:down|left:right|day:night|open:closed|old:new|early:late|high:low|light:dark|"
    "full:empty|wet:dry|hard:soft|rich:poor|true:false|happy:sad|strong:weak|inside:outside|first:last"
).split("|")]

# (answer, [questions]); the last two questions of each are held back
GENERAL = [
    ("The largest planet in the solar system is Jupiter.",
     ["What is the largest planet?", "Which planet is the largest?", "What is the biggest planet in the solar system?",
      "Name the largest planet.", "Tell me the biggest planet.", "What's the biggest planet?",
      "largest planet in the solar system",
      "Which planet is the biggest?", "What is the largest planet in the solar system?"]),
    ("The smallest planet in the solar system is Mercury.",
     ["What is the smallest planet?", "Which planet is the smallest?", "Name the smallest planet.", "What's the smallest planet?",
      "Tell me the smallest planet.", "smallest planet in the solar system", "Which planet is the smallest one?",
      "What is the smallest planet in the solar system?"]),
    ("Water boils at 100 degrees Celsius at sea level.",
     ["At what temperature does water boil?", "When does water boil?", "What is the boiling point of water?",
      "Tell me the boiling point of water.", "How hot is boiling water?", "boiling point of water",
      "Water boils at what temperature?",
      "What's the boiling point of water?", "At which temperature does water boil?"]),
    ("Water freezes at 0 degrees Celsius.",
     ["At what temperature does water freeze?", "When does water freeze?", "What is the freezing point of water?",
      "Tell me the freezing point of water.", "freezing point of water", "Water freezes at what temperature?",
      "What's the freezing point of water?", "At which temperature does water freeze?"]),
    ("The chemical formula of water is H2O.",
     ["What is the chemical formula of water?", "What is water made of?", "Which formula does water have?",
      "Give me the formula of water.",
      "Tell me the formula of water.", "water formula", "What's the chemical formula of water?",
      "What is the formula of water?"]),
    ("The largest ocean is the Pacific Ocean.",
     ["What is the largest ocean?", "Which ocean is the largest?", "What is the biggest ocean?", "Name the largest ocean.",
      "Tell me the biggest ocean.", "largest ocean on Earth", "Which ocean is the biggest?", "What's the largest ocean?"]),
    ("The highest mountain on Earth is Mount Everest.",
     ["What is the highest mountain?", "Which mountain is the highest?", "What is the tallest mountain?",
      "Name the highest mountain.",
      "Tell me the tallest mountain on Earth.", "highest mountain in the world", "What's the highest mountain on Earth?",
      "Which mountain is the tallest?", "What is the highest mountain on Earth?"]),
    ("The Earth goes around the Sun.",
     ["What does the Earth go around?", "Does the Earth go around the Sun?", "What does our planet go around?",
      "Does the Sun go around the Earth?", "Tell me what the Earth goes around.", "What does planet Earth go around?",
      "What is it that the Earth goes around?"]),
    ("The star closest to Earth is the Sun.",
     ["What is the closest star?", "Which star is closest to Earth?", "What is the nearest star?",
      "Name the star closest to Earth.",
      "Tell me the nearest star to Earth.", "closest star to Earth", "Which star is nearest to Earth?",
      "What is the closest star to Earth?"]),
    ("The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
     ["List the days of the week.", "What are the days of the week?", "Name all days of the week.", "Which days are in a week?",
      "Tell me the days of the week.", "Name the days of the week.", "Can you list the days of the week?"]),
    ("The seasons are spring, summer, autumn and winter.",
     ["List the seasons.", "What are the seasons?", "Name the four seasons.", "Which seasons are there?",
      "Tell me the seasons of the year.",
      "What are the four seasons?", "Name all seasons.", "Name the seasons.", "What are the seasons of the year?"]),
    ("The planets are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",
     ["List the planets.", "What are the planets?", "Name all planets.", "Which planets are in the solar system?",
      "Tell me the planets in order.", "Name the eight planets.", "List the planets in order.", "Name the planets.",
      "What are the planets of the solar system?"]),
    ("The primary colours of light are red, green and blue.",
     ["What are the primary colours of light?", "Name the primary colours of light.", "List the primary colours of light.",
      "Which colours are the primary colours of light?", "Tell me the primary colours of light.",
      "Which are the primary colours of light?"]),
    ("Blue and yellow paint make green.",
     ["What do blue and yellow make?", "What colour do blue and yellow make?", "Mix blue and yellow paint.",
      "Which colour do I get from blue and yellow?", "What do you get if you mix blue and yellow?",
      "blue and yellow make what colour?",
      "Which colour do blue and yellow make?", "What colour do I get if I mix blue and yellow?"]),
    ("Red and yellow paint make orange.",
     ["What do red and yellow make?", "What colour do red and yellow make?", "Mix red and yellow paint.",
      "Which colour do I get from red and yellow?", "What do you get if you mix red and yellow?",
      "red and yellow make what colour?",
      "Which colour do red and yellow make?", "What colour do I get if I mix red and yellow?"]),
    ("Red and blue paint make purple.",
     ["What do red and blue make?", "What colour do red and blue make?", "Mix red and blue paint.",
      "Which colour do I get from red and blue?", "What do you get if you mix red and blue?", "red and blue make what colour?",
      "Which colour do red and blue make?", "What colour do I get if I mix red and blue?"]),
    ("A clear sky is blue by day.",
     ["What colour is the sky?", "Which colour does the sky have?", "What colour is a clear sky?",
      "Tell me the colour of the sky.",
      "Is the sky blue?", "colour of the sky", "What is the colour of the sky?", "Which colour is the sky?"]),
    ("Grass is green.",
     ["What colour is grass?", "Which colour does grass have?", "Tell me the colour of grass.", "Is grass green?",
      "colour of grass",
      "What is the colour of grass?", "Which colour is grass?"]),
]
