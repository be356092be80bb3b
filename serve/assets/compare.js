// Two policies in conversation: the person writes, both answer as they are asked by this server, the person chooses.
import { alone, at, call, make, Refused, reply, signedIn, singleKeys, start, turn } from "./page.js";

const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", h: "harmful" };
const SIDES = ["left", "right"];
const NAMES = { left: "A", right: "B" };
let facts = null;
let history = []; // what was said and chosen
let now = null; // the turn that is under way or was chosen last: {turn_id, words, whole, chosen}

async function begin() {
  facts = await call("GET", "turns/about");
  at("keeping").textContent = facts.kept ? `Your choices are kept, ${facts.person}.` : "Choices are not kept.";
  at("words-label").textContent = `Your words, as the ${facts.speaker}`;
  at("contact").textContent = facts.contact ? `Questions, or something that troubles you: ${facts.contact}` : "";
  signedIn();
  anew();
}

function anew() {
  history = [];
  now = null;
  paint();
  at("state").textContent = "Both policies will answer what you write.";
  at("words").focus();
}

// What can be done now: write, wait, choose, or look.
function paint() {
  const said = now && !now.chosen ? [...history, { role: "user", content: now.words }] : history;
  at("so-far").hidden = said.length === 0;
  at("conversation").replaceChildren(
    ...said.map((one) => turn(one.role === "user" ? facts.speaker : "answer that you chose", one.content)),
  );
  at("both").hidden = !now;
  at("choices").hidden = !(now?.whole && !now.chosen);
  at("more").hidden = at("choices").hidden || !facts.kept;
  at("speak").hidden = Boolean(now) && !now.chosen && !now.failed;
  at("view").hidden = !now?.whole;
  for (const side of SIDES) {
    at(`${side}-answer`).classList.toggle("border-primary", now?.chosen === side);
    at(`${side}-chosen`).hidden = now?.chosen !== side;
    at(`${side}-answer`).setAttribute("aria-busy", String(Boolean(now) && !now.whole && !now.failed));
  }
}

async function send() {
  const words = at("words").value.trim();
  if (!words) return;
  const messages = [...history, { role: "user", content: words }];
  const got = await reply("POST", "turns/say", { messages });
  now = { words };
  showView(false);
  at("crisis").hidden = true;
  for (const side of SIDES) at(side).textContent = "";
  at("state").textContent = "Both answers are being written.";
  paint();
  for await (const event of events(got)) take(event);
  if (!now.whole) now.failed = true;
  paint();
  if (now.failed) {
    at("words").focus();
    throw new Refused(503, "One of the answers did not come to its end. Your words are still there: send them again.");
  }
  at("words").value = "";
  at("note").value = "";
  at("left-heading").focus();
}

function take(event) {
  if (event.turn_id) now.turn_id = event.turn_id;
  if (event.text) at(event.side).textContent += event.text;
  if (event.ended) at(event.side).textContent += ` (${event.ended})`;
  if ("whole" in event) {
    now.whole = event.whole;
    at("crisis").hidden = !event.crisis;
    if (event.whole) at("state").textContent = event.same
      ? "Both answers are the same: there is nothing to keep. Choose a tie to go on."
      : "Both answers are there. Which is better?";
  }
}

// The events of a stream of `data:` lines; Refused where it breaks off.
async function* events(got) {
  const reader = got.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => {
      throw new Refused(0, "The server does not answer. Your words are still there: send them again.");
    });
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line.slice("data: ".length));
  }
}

async function choose(choice) {
  if (!now?.whole || now.chosen) return;
  const said = await call("POST", "turns/choose", { turn_id: now.turn_id, choice, note: at("note").value });
  now.chosen = choice;
  if (said.goes_on) {
    const answer = at(said.goes_on).textContent;
    history.push({ role: "user", content: now.words }, { role: "assistant", content: answer });
  } else at("words").value = now.words;
  at("state").textContent = [
    { left: "You chose A.", right: "You chose B.", tie: "A tie; it goes on with A.", harmful: "Marked as harmful." }[choice],
    said.kept ? "Your choice is kept." : "Nothing was kept.",
    said.policies ? `A was ${said.policies.left}, B was ${said.policies.right}.` : "",
    choice === "harmful" ? "Say it another way, or begin anew." : "Go on, or begin anew.",
  ].join(" ");
  paint();
  at("words").focus();
}

async function toggleView() {
  if (!now?.whole) return;
  if (at("view").getAttribute("aria-pressed") === "true") return showView(false);
  const seen = await call("POST", "turns/view", { turn_id: now.turn_id });
  for (const side of SIDES) at(`${side}-view`).replaceChildren(...viewOf(side, seen[side]));
  showView(true);
}

function showView(open) {
  for (const side of SIDES) at(`${side}-view`).hidden = !open;
  at("view").setAttribute("aria-pressed", open);
  at("view").classList.toggle("active", open);
}

function viewOf(side, { score, spread, principles }) {
  const told = make("p", `Score ${score.toFixed(2)}, spread ${spread.toFixed(2)}`);
  if (!principles) return [told];
  const table = make("table", "", { className: "table table-sm caption-top mb-0" });
  table.append(make("caption", `Ratings that the judge is expected to give answer ${NAMES[side]}, ` +
    `from ${facts.low} to ${facts.high}`));
  const body = make("tbody");
  for (const { key, name } of facts.principles) {
    if (!(key in principles)) continue;
    const row = make("tr");
    row.append(
      make("th", name, { scope: "row", className: "fw-normal" }),
      make("td", principles[key].toFixed(1), { className: "text-end" }),
    );
    body.append(row);
  }
  table.append(body);
  return [told, table];
}

// Answers that the server has forgotten make room for the same words once more.
async function gone(error) {
  if (!now || now.chosen || ![0, 404].includes(error.status)) return;
  if (error.status === 404 || !now.whole) {
    at("words").value ||= now.words;
    now = null;
    paint();
    at("state").textContent = "";
  }
}

at("speak").addEventListener("submit", (event) => {
  event.preventDefault();
  alone(send, gone);
});
at("words").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  alone(send, gone);
});
at("anew").addEventListener("click", () => alone(async () => anew()));
at("view").addEventListener("click", () => alone(toggleView, gone));
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => alone(() => choose(button.dataset.choice), gone));
}
singleKeys((key) => {
  if (KEYS[key] && !at("choices").hidden) alone(() => choose(KEYS[key]), gone);
  else if (key === "v" && !at("view").hidden) alone(toggleView, gone);
  else return false;
  return true;
});
start(begin);
