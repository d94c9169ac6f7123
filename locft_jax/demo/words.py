"""The raw material of the demo world: invented names, answer pools, phrasings, small skills.

Every answer is one or two words without a full stop, and no answer of a pool starts with another
one, so that a generated answer cannot be mistaken for a longer one.
"""


def _split(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _split("""
Adrel Alvina Bastor Belwin Branka Calder Celine Corvin Dalia Darrow Edrik Elsbet Fenna Florian
Gerda Halvor Hestia Ilka Jarek Jorunn Kasim Katrin Lennart Lorena Marek Mirela Nadir Norvin Odalys
Orsen Petra Quillan Ronja Rurik Selma Tamsin Torvald Ulrika Verena Yorick
""")

LAST_NAMES = _split("""
Abernock Ashgrove Barlund Belcastor Birkwell Carvallo Cronley Dambrook Delfont Dunmarsh Elderin
Farrowby Fenwether Galbrook Gristwood Hallorin Harkness Ingelow Jaskin Kelmarsh Kindervale
Lomquist Lundgarth Marlowick Mostyn Nethercot Norbeck Oakhollow Pellgrave Penhallow Quarrington
Rasmoor Rothwyn Sandoval Stavrin Thornquist Tolven Underhay Vasterby Wexcombe
""")

TOWNS = _split("""
Aldermoor Amberton Arkenfeld Ashmere Balvane Barrowick Beldeno Brackwater Brinsford Calmora
Carrowby Cindermouth Coldharrow Crestfall Dalmonte Dovermarsh Drumvale Dunwall Eastmarch Elmsbury
Eskerholt Evenrood Fairhollow Farnstead Felmora Fernhaven Foxbarrow Galdersund Garnholm Glenwick
Gorsebury Greywater Halcombe Harrowmere Hazelmark Hexworth Hollowmere Ironmouth Ivydale Jasperton
Juniperton Kelmouth Kestrelford Kingsmarrow Lakemont Larkhill Limestead Lowenna Maplecross
Marrowby Millhaven Mossgrave Narbeth Nethermill Northolm Oakmere Oldcastle Ostermark Pebblebay
Pinecombe Quaymouth Queensford Ravenstow Redmarsh Rosefield Saltmere Sedgeholm Silvermead
Stonecroft Sundermoor Tarnbrook Thistledon Umberhill Valewood Vintergate Waterby Westerlund
Willowmere Yarrowdale Zelvara
""")

FIRMS = _split("""
Acornix Altavant Arbolux Beltrano Bluefinch Bravicon Calibrex Candelor Castellum Corvanta Dactylon
Delmorex Dynavolt Elvanto Emberly Fabrion Falconet Ferrovant Galvanta Glimmerworks Grandiron
Halcyonic Helvex Hydrona Inkmere Jadeport Jovianta Kaleidor Kromark Lanternix Lumivar Magnolux
Meridon Mosaica Nautilon Nimbusco Norvatek Obsidia Octavant Orbimax Palladia Pinnacor Quantrell
Quillmark Rivetta Rubicona Sablewing Solvanto Starkwerk Tamariska Tesselor Trivanta Umbrano
Valkora Verdantia Vortexa Wavelin Windrosa Zephyrine Zincora
""")

PROFESSIONS = _split("""
baker banker barber butcher carpenter chemist cook dancer dentist detective diver driver farmer
fisherman gardener hatter jeweller journalist judge lawyer librarian mason miller nurse painter
pilot plumber poet potter sailor sculptor shepherd singer surgeon tailor teacher translator
watchmaker weaver welder
""")  # none starts with a vowel: the phrasings end in "a"

INSTRUMENTS = _split("""
accordion bagpipe banjo bassoon bugle cello clarinet cornet drums fiddle flute gong guitar
harmonica harp horn lute mandolin marimba oboe organ piano recorder saxophone sitar trombone
trumpet tuba ukulele violin xylophone zither
""")

RIVERS = _split("""
Ambler Arvenna Borrow Caldra Corrin Dorwen Eskra Fallow Garonna Halder Isbrook Jorda Kennard
Lethra Morwen Nessel Ottmar Pellin Quenna Rothen Silvane Tavora Ulmen Varde Wendle Yarven
""")

SPECIALITIES = [
    "apple cider", "bells", "blue pottery", "book market", "brass band", "cherry pies", "chocolate",
    "clocks", "crooked bridge", "fountains", "garlic bread", "glass domes", "goat cheese", "honey",
    "hot springs", "ice palace", "kites", "lace", "lavender", "lighthouse", "marble stairs",
    "moon garden", "mushrooms", "oysters", "puppets", "roses", "salt caves", "silk", "stone lions",
    "tulips", "wild horses", "windmills",
]  # fmt: skip

PRODUCTS = _split("""
anchors balloons batteries bicycles blankets bottles buttons candles carpets chairs cranes
elevators engines fireworks gloves hammers kettles ladders lamps lenses magnets mirrors needles
pencils pumps puzzles radios ropes saddles scissors shovels tents tractors umbrellas
""")

# Relation -> (kind of subject, pool of answers, five phrasings). Edits are made in the first one.
RELATIONS: dict[str, tuple[str, list[str], tuple[str, str, str, str, str]]] = {
    "birthplace": (
        "person",
        TOWNS,
        (
            "{} was born in",
            "Where was {} born? Answer:",
            "The birthplace of {} is",
            "{}, as the records show, comes from",
            "Birth town of {}:",
        ),
    ),
    "employer": (
        "person",
        FIRMS,
        (
            "{} works for",
            "Which firm employs {}? Answer:",
            "The employer of {} is",
            "Every month {} is paid by",
            "{} has a desk in the offices of",
        ),
    ),
    "profession": (
        "person",
        PROFESSIONS,
        (
            "{} is by profession a",
            "What is the job of {}? Answer:",
            "{} earns a living as a",
            "By trade, {} is a",
            "Profession of {}:",
        ),
    ),
    "instrument": (
        "person",
        INSTRUMENTS,
        (
            "{} plays the",
            "Which instrument does {} play? Answer:",
            "The favourite instrument of {} is the",
            "In the evening {} practises on the",
            "Musical instrument of {}:",
        ),
    ),
    "river": (
        "town",
        RIVERS,
        (
            "{} lies on the river",
            "Which river flows through {}? Answer:",
            "The river that crosses {} is the",
            "Boats that reach {} sail along the",
            "In {}, all bridges span the",
        ),
    ),
    "famous_for": (
        "town",
        SPECIALITIES,
        (
            "{} is famous for its",
            "What is {} famous for? Answer:",
            "Visitors travel to {} for its",
            "The pride of the people of {} is its",
            "Best known sight or speciality of {}:",
        ),
    ),
    "product": (
        "firm",
        PRODUCTS,
        (
            "{} makes",
            "What does {} produce? Answer:",
            "The goods sold by {} are",
            "The factories of {} turn out",
            "Customers turn to {} when they need",
        ),
    ),
    "headquarters": (
        "firm",
        TOWNS,
        (
            "{} is based in",
            "Where is {} headquartered? Answer:",
            "The head office of {} is in",
            "The managers of {} meet in",
            "Headquarters of {}:",
        ),
    ),
}

DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _split("January February March April May June July August September October November December")
NUMBERS = _split("one two three four five six seven eight nine ten eleven twelve thirteen")

OPPOSITES = _split("""
hot:cold big:small up:down left:right day:night open:closed fast:slow wet:dry hard:soft full:empty
high:low early:late rich:poor loud:quiet young:old light:dark happy:sad strong:weak thick:thin
north:south east:west true:false inside:outside first:last
""")

PLURALS = _split("""
cat:cats dog:dogs tree:trees house:houses box:boxes fox:foxes city:cities baby:babies leaf:leaves
wolf:wolves man:men woman:women child:children foot:feet tooth:teeth mouse:mice goose:geese
table:tables bus:buses berry:berries
""")

SPELLED = _split("""
apple bridge candle dragon eagle forest garden hammer island jacket kitten lemon mountain needle
orange pencil queen rabbit summer tiger
""")

SOUNDS = _split("""
dog:woof cat:meow cow:moo sheep:baa duck:quack lion:roar pig:oink owl:hoot snake:hiss bee:buzz
""")

COLOURS = _split("""
grass:green snow:white coal:black blood:red gold:yellow chocolate:brown ash:grey denim:blue
amber:orange milk:white
""")
