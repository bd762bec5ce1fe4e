"""Makes the classifier that ships: ``python -m dspy_lora.seedling.router --data FOLDER``.

FOLDER holds ``domains/<domain>/<set>/train.jsonl`` of the sets named here, whose licences allow that weights made from
them are passed on, and may hold ``pretrain/eltec_novels.txt.xz``. The vocabularies were written for this file: no five
words in a row stand in a set that is kept out of the training.

    TAT-QA, CUAD, MedQuAD, Overruling, Pros and Cons, Banking77         CC BY 4.0
    CLINC150                                                            CC BY 3.0
    Schema-Guided Dialogue (CC BY-SA 4.0), Medical Abstracts (CC BY-SA 3.0)
    MWO2KG, SciCite, CSAbstruct, TRAM                                   Apache-2.0
    MaintNorm, MMLU, Clickbait headlines                                MIT
    WikiSQL (BSD-3-Clause), IT service tickets (CC0), ELTeC novels of 1840 to 1920 (public domain)
"""

import argparse
import lzma
import random
import re
from pathlib import Path

from dspy_lora.detection.classifier import PACKAGED, DomainClassifier
from dspy_lora.training.data import read_rows

_ROWS = 6000  # of a domain's own set
_OTHER_ROWS = 1000  # of another set of the domain
_ASSISTANT_ROWS = 2000
_REPEATS = 10  # of a vocabulary, so that it weighs something beside the rows
_PLAIN_ROWS = 500  # of headlines, and of sentences of novels

# The set of each domain; then other sets of it, of another task.
_SETS: dict[str, tuple[str, ...]] = {
    "financial": ("financial/tatqa_answer_type",),
    "legal": ("legal/cuad", "legal/overruling"),
    "healthcare": ("healthcare/medquad", "healthcare/medical_abstracts"),
    "marketing": ("marketing/pros_cons",),
    "manufacturing": ("manufacturing/work_order_items", "manufacturing/maintnorm"),
    "real_estate": ("real_estate/home_intent", "real_estate/home_criteria"),
    "education": ("education/mmlu_subject",),
    "analytics": ("analytics/wikisql_aggregate",),
    "operations": ("operations/it_tickets",),
    "customer_service": ("customer_service/banking77",),
    "research": ("research/scicite", "research/csabstruct"),
    "specialized": ("specialized/tram",),
}
# Text of no domain: an assistant's messages, headlines, and sentences of novels.
_ASSISTANT = "customer_service/clinc150"
_HEADLINES = "marketing/clickbait"
_NOVELS = "eltec_novels.txt.xz"
# The intents of CLINC150 that belong to a bank: messages of customer service.
_BANK = frozenset(
    """account_blocked apr application_status balance bill_balance bill_due card_declined credit_limit
    credit_limit_change credit_score damaged_card exchange_rate expiration_date freeze_account improve_credit_score
    interest_rate international_fees min_payment new_card order_checks pay_bill pin_change redeem_rewards
    replacement_card_duration report_fraud report_lost_card rewards_balance routing spending_history transactions
    transfer travel_notification""".split()
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\u2019\u201d]*\s+")

VOCABULARY: dict[str, str] = {
    "financial": (
        "gross margin and operating margin; change in revenue over the prior year; earnings per share; income "
        "statement; income before taxes; net income and comprehensive income; operating expenses; quarterly earnings "
        "forecast; dividend payout ratio; common stock, preferred stock and treasury shares; stock market index; "
        "share buyback and equity issuance; mergers, acquisitions and takeovers; enterprise value and market "
        "capitalization; value of a business; segment revenue; stock-based compensation expense; operating, investing "
        "and financing cash flows; cash flow implications of the merger; balance sheet, assets and liabilities; "
        "working capital; depreciation and amortization; return on equity; bond yield to maturity; interest rate and "
        "exchange rate risk; net present value; cost of capital; stock price and portfolio; monetary policy of the "
        "central bank; inflation and unemployment; gross domestic product; supply and demand curve; price elasticity; "
        "marginal cost and marginal revenue; monopoly and perfect competition; budget deficit and government "
        "spending; fiscal policy; money supply and banks; tariffs and international trade; economic growth; revenue "
        "recognition; earnings before interest and taxes; investors, analysts and shareholders; severance and "
        "restructuring charges; accounts receivable and inventory; lease obligations; financing, loans and credit; "
        "private equity investment; annual report; fiscal year; goodwill impairment; deferred tax; hedge fund; "
        "auditor"
    ),
    "legal": (
        "review the contract terms; breach of contract and damages; offer, acceptance and consideration; governing "
        "law and jurisdiction; limitation of liability; indemnification; confidentiality and non-disclosure "
        "agreement; termination clause; intellectual property licence, patent, copyright and trademark; negligence "
        "and tort; strict liability; plaintiff and defendant; the court held; appeal to the supreme court; statute "
        "and regulation; constitutional law and due process; criminal law, felony and misdemeanor; jury trial; "
        "antitrust law; bankruptcy law; employment discrimination law; agency law, principal and agent; arbitration "
        "and mediation; fiduciary duty; partnership and limited liability company; securities law; warranties and "
        "sale of goods under the uniform commercial code; real property law; wills and trusts; lawsuit; attorney and "
        "client; subpoena and evidence; injunction; precedent; the party shall not assign this agreement; is this "
        "clause enforceable; consumer protection law; administrative agency; litigation; court of appeals; judge; "
        "legal rights"
    ),
    "healthcare": (
        "symptoms, causes and treatment of a disease; diagnosis of the patient; side effects of the drug; blood "
        "pressure and heart failure; infection with bacteria or viruses; antibiotics and vaccines; immune response "
        "and antibodies; cancer chemotherapy; diabetes and insulin; genetic disorder inherited from parents; nerve "
        "and muscle cells; bones, joints and ligaments; kidney, liver, stomach and intestine; hormones and glands; "
        "the respiratory system and lungs; blood vessels, arteries and veins; red blood cells and hemoglobin; "
        "pregnancy and childbirth; surgery; clinical trial of patients; pathogens and microorganisms; inflammation of "
        "the tissue; neurons, brain and spinal cord; skin and epidermis; digestion and nutrition; sore throat and "
        "fever; dosage of a medicine; mental health; physical therapy; nurse and doctor; epidemic disease; anatomy "
        "and physiology; bacterial cell wall; fungal and parasitic infection; DNA replication in cells; lymph nodes; "
        "vision and hearing"
    ),
    "marketing": (
        "pros and cons of the product; great battery life; easy to use; poor quality; too expensive for what it does; "
        "customer reviews; brand awareness campaign; advertising copy; target audience and market segmentation; "
        "positioning of a brand; the marketing mix; price, product, place and promotion; social media campaign; "
        "customer lifetime value; email newsletter subject line; slogan for a new product; consumer behavior; search "
        "engine optimization; sales promotion and coupons; public relations; distribution channels; product launch; "
        "personal selling; loyalty program; influencer; market research survey of consumers; click-through rate"
    ),
    "manufacturing": (
        "replace hydraulic hose; engine oil leak; repair cracked bracket; pump failure; bearing worn out; conveyor "
        "belt inspection; work order for maintenance; bucket teeth; air conditioner not working; change out filter; "
        "welding of the boom; gearbox vibration; production line downtime; preventive maintenance schedule; machine "
        "tolerance and torque; heat exchanger and pipe flow; steam turbine; beam load and stress; electric motor, "
        "generator and transformer; voltage and current in the circuit; fluid velocity and pressure; pressure and "
        "temperature in the cylinder; compressor and nozzle; thermal conductivity of the wall; steel shaft diameter; "
        "concrete column; friction factor; control system and feedback; resistor and capacitor; strength of "
        "materials; adiabatic gas expansion; Reynolds number; spring constant and vibration; quality control on the "
        "assembly line; the tank is filled with water; heat transfer coefficient; horsepower and efficiency of the "
        "engine; coolant; spare parts"
    ),
    "real_estate": (
        "find an apartment to rent; two bedroom house in the city; schedule a visit to the property; monthly rent; "
        "pets allowed; number of bathrooms; furnished flat; mortgage for a home; landlord and tenant; property "
        "listing; home for sale; open house; square feet; balcony and garage; move in next month; phone number of the "
        "property"
    ),
    "education": (
        "which of the following is correct; exam question for students; high school chemistry; college physics; world "
        "history; philosophy and moral theory; psychology; geography; elementary mathematics; abstract algebra; "
        "computer science; astronomy; religion; homework; lesson plan for the class; explain to a student; quiz"
    ),
    "analytics": (
        "how many rows; total number by year; the average score; the maximum value; count the records where the name "
        "is; sum of sales by region; highest and lowest; which team has the most points; sort the table by date; SQL "
        "query over the table; group by country; null hypothesis and significance level; confidence interval for the "
        "mean; standard deviation of the sample; normal distribution; probability of the event; linear regression and "
        "correlation; histogram and box plot; median and quartiles; random variable; sampling method; binomial "
        "distribution; p-value of the hypothesis test; chi-square test; analysis of variance; percentile; outliers in "
        "the data set; survey data; expected value; scatter plot; the data are collected; dashboard of metrics; trend"
    ),
    "operations": (
        "reset my password; cannot log in to the system; request access to the shared folder; new laptop for the new "
        "starter; printer not working; vpn connection problem; software installation; please open a ticket; outlook "
        "error; server down; purchase order approval; hardware request; network outage; timecard; disk space full; "
        "meeting room booking; account locked; upgrade of the database; deployment failed; email distribution list"
    ),
    "customer_service": (
        "my card has not arrived; I was charged twice; how do I top up my account; cash withdrawal declined; my "
        "transfer is pending; refund for my order; change my PIN; lost or stolen card; exchange rate for my payment; "
        "close my account; verify my identity; the ATM swallowed my card; fee for the transfer; cancel my "
        "subscription; where is my parcel; complaint about the delivery; speak to an agent; payment not recognised"
    ),
    "research": (
        "we propose a method; previous studies have shown; our results are consistent with; as described by Smith et "
        "al.; in this paper we present; related work; experiments show that our approach outperforms; the literature "
        "on; we used the protocol of; abstract of the paper; limitations and future work; citation; peer review; the "
        "hypothesis was supported by the findings (Jones 2010); state of the art baselines; methodology section"
    ),
    "specialized": (
        "the malware creates a registry run key; the threat actor used spearphishing attachments; lateral movement "
        "with stolen credentials; command and control over HTTPS; ransomware encrypts files; privilege escalation "
        "exploit; PowerShell script downloads the payload; exfiltration of data; obfuscated code; MITRE ATT&CK "
        "technique; backdoor persistence; keylogger; dumps LSASS memory; scans for open ports; the adversary; "
        "indicators of compromise; vulnerability and CVE; scheduled task; DLL side-loading; the trojan injects into a "
        "process"
    ),
}


def texts_by_domain(data: Path, seed: int) -> tuple[dict[str, list[str]], list[str]]:
    """The texts of each domain, and those of none."""
    rng = random.Random(seed)
    assistant = read_rows(data / "domains" / _ASSISTANT / "train.jsonl")
    bank = [row["text"] for row in assistant if row["label"] in _BANK]
    found = {}
    for name, sets in _SETS.items():
        found[name] = _some(_read(data, sets[0]), _ROWS, rng) + VOCABULARY[name].split("; ") * _REPEATS
        for other in sets[1:]:
            found[name] += _some(_read(data, other), _OTHER_ROWS, rng)
    found["customer_service"] += _some(bank, _OTHER_ROWS, rng)
    background = _some([row["text"] for row in assistant if row["label"] not in _BANK], _ASSISTANT_ROWS, rng)
    background += _some(_read(data, _HEADLINES), _PLAIN_ROWS, rng)
    novels = _novels(data)
    if novels.is_file():
        sentences = _SENTENCE_END.split(lzma.decompress(novels.read_bytes()).decode())
        background += _some([text.strip() for text in sentences if 15 <= len(text) <= 250], _PLAIN_ROWS, rng)
    return found, background


def sources(data: Path) -> dict[str, str]:
    """Where the texts of each domain come from, as the classifier's record says it; novels only where they are."""
    found = {name: f"{', '.join(sets)} and a vocabulary" for name, sets in _SETS.items()}
    found["customer_service"] += f", banking intents of {_ASSISTANT}"
    novels = ", ELTeC novels" if _novels(data).is_file() else ""
    return found | {"no domain": f"other intents of {_ASSISTANT}, {_HEADLINES}{novels}"}


def _novels(data: Path) -> Path:
    return data / "pretrain" / _NOVELS


def _read(data: Path, name: str) -> list[str]:
    return [row["text"] for row in read_rows(data / "domains" / name / "train.jsonl")]


def _some(texts: list[str], most: int, rng: random.Random) -> list[str]:
    return rng.sample(texts, min(most, len(texts)))


def main() -> None:
    """Trains on the sets and writes the packaged classifier."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=PACKAGED)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    domains, background = texts_by_domain(args.data, args.seed)
    classifier = DomainClassifier.train(domains, background=background, sources=sources(args.data), seed=args.seed)
    print(f"{classifier!r}\nmargin {classifier.margin}: {classifier.save(args.out)}")


if __name__ == "__main__":
    main()
