// The experts' page: one question at a time from this server, and from nowhere else.
import { alone, announce, at, call, make, signedIn, signOut, singleKeys, start, turn } from "./page.js";

const LOOK_AGAIN_MS = 10000;
const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", s: "skip", h: "harmful" };
const WORDS = { left: "left is better", right: "right is better", tie: "tie", skip: "skipped", harmful: "harmful" };
let question = null;
let rubric = null;
let asked = 0; // how often for the counts

async function begin() {
  rubric = await call("GET", "experts/rubric");
  at("scale").textContent = `From ${rubric.low} (poor) to ${rubric.high} (excellent)`;
  at("ratings").replaceChildren(...rubric.principles.map(ratingRow));
  at("contact").textContent = rubric.contact ? `Questions, or something that troubles you: ${rubric.contact}` : "";
  signedIn();
  await following();
}

function ratingRow(principle) {
  const row = make("tr");
  const name = make("th", principle.name, { scope: "row", className: "fw-normal text-break" });
  name.append(make("small", principle.guidance, { className: "d-block text-body-secondary" }));
  row.append(name, ...["left", "right"].map((side) => ratingCell(principle, side)));
  return row;
}

function ratingCell(principle, side) {
  const cell = make("td");
  const select = make("select", "", { className: "form-select w-auto" });
  select.dataset.side = side;
  select.dataset.key = principle.key;
  select.setAttribute("aria-label", `${principle.name}, ${side} response`);
  select.append(new Option("–", ""));
  for (let n = rubric.low; n <= rubric.high; n++) select.append(new Option(n, n));
  cell.append(select);
  return cell;
}

async function following() {
  show(await call("GET", "experts/next"));
  counts();
}

// Nobody waits for them: keys and buttons work as soon as there is a question. What keeps them from coming is told by
// the next thing that somebody does, and where they are overtaken the later ones hold.
async function counts() {
  const mine = ++asked;
  const got = await Promise.all(["progress", "agreement"].map((what) => call("GET", `experts/${what}`))).catch(() => null);
  if (got && mine === asked) tally(...got);
}

function tally(now, { all, last }) {
  announce("progress", `${now.answered} answered by you, ${now.left} left for you; ` +
    `${now.given} of ${now.wanted} answers are in`);
  fill(at("bar"), now.answered, now.answered + now.left);
  at("undo").hidden = now.answered + now.skipped === 0;
  at("agreement").textContent = all.compared
    ? `Others said the same as you in ${percent(last.agree)} of your last answers that they gave too, ` +
      `${percent(all.agree)} of all ${all.compared}.`
    : "";
}

function fill(bar, done, all) {
  bar.setAttribute("aria-valuenow", done);
  bar.setAttribute("aria-valuemax", Math.max(all, 1));
  bar.firstElementChild.style.width = `${(100 * done) / Math.max(all, 1)}%`;
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

function show(next) {
  question = next;
  at("question").hidden = !next;
  announce("nothing", next ? "" : "There is no question for you just now. This page looks again by itself.");
  if (!next) return;
  const { said } = next;
  const names = { user: rubric.speaker, assistant: rubric.answerer };
  at("conversation").replaceChildren(...next.messages.map((one) => turn(names[one.role] ?? one.role, one.content)));
  at("left").textContent = next.left;
  at("right").textContent = next.right;
  at("note").value = said ? said.note : "";
  for (const select of document.querySelectorAll("#ratings select")) {
    select.value = said?.ratings[select.dataset.side]?.[select.dataset.key] ?? "";
  }
  at("earlier").textContent = said ? `You took your answer back; it was: ${WORDS[said.choice]}.` : "";
  window.scrollTo({ top: 0, behavior: "instant" });
  at("conversation-heading").focus({ preventScroll: true });
}

async function answer(choice) {
  if (!question) return;
  const ratings = {};
  for (const { value, dataset } of document.querySelectorAll("#ratings select")) {
    if (value) (ratings[dataset.side] ??= {})[dataset.key] = Number(value);
  }
  const given = { question_id: question.question_id, choice, ratings, note: at("note").value };
  await call("POST", "experts/answer", given);
  at("undo").hidden = false;
  await following();
}

async function undo() {
  show(await call("POST", "experts/undo"));
  counts();
}

async function stop() {
  await call("POST", "experts/release");
  question = null;
  signOut("You have stopped. Every answer is kept, and the open question is free for others.");
}

// A question that is gone (others took it, or its time is over) makes room for the next one.
async function gone(error) {
  if ((error.status === 404 || error.status === 410) && question) await following().catch(() => {});
}

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => alone(() => answer(button.dataset.choice), gone));
}
at("undo").addEventListener("click", () => alone(undo));
at("stop").addEventListener("click", () => alone(stop));
singleKeys((key) => {
  if (KEYS[key] && question) alone(() => answer(KEYS[key]), gone);
  else if (key === "u" && !at("undo").hidden) alone(undo);
  else return false;
  return true;
});
setInterval(() => {
  if (rubric && !question && !at("work").hidden) alone(following);
}, LOOK_AGAIN_MS);
start(begin);
