// The experts' page: one question at a time from this server, and from nowhere else.
"use strict";

const LOOK_AGAIN_MS = 10000;
const KEYS = { 1: "left", ArrowLeft: "left", 2: "right", ArrowRight: "right", t: "tie", s: "skip", h: "harmful" };
const at = (id) => document.getElementById(id);
let token = sessionStorage.getItem("token") || "";
let question = null;
let rubric = null;
let busy = false;

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function call(method, path, body) {
  const headers = { Authorization: `Bearer ${token}` };
  if (body) headers["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(`experts/${path}`, { method, headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Refused(0, "The server does not answer. Nothing is lost: try again in a moment.");
  }
  if (reply.status === 204) return null;
  const said = await reply.json().catch(() => ({}));
  if (!reply.ok) throw new Refused(reply.status, typeof said.detail === "string" ? said.detail : "This was refused.");
  return said;
}

function tell(text) {
  at("message").textContent = text;
  at("message").hidden = !text;
}

// One thing at a time: a key that is held down must not answer the next question as well.
async function alone(work) {
  if (busy) return;
  busy = true;
  for (const button of document.querySelectorAll("button")) button.disabled = true;
  try {
    tell("");
    await work();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) return signIn(token ? "This key is not known here." : "");
    if (error.status === 403) return signIn("This key is not one of an expert's.");
    tell(error.message);
    if ((error.status === 404 || error.status === 410) && question) await following().catch(() => {});
  } finally {
    busy = false;
    for (const button of document.querySelectorAll("button")) button.disabled = false;
  }
}

function signIn(text) {
  token = "";
  question = null;
  sessionStorage.removeItem("token");
  at("sign-in").hidden = false;
  for (const id of ["question", "nothing", "undo"]) at(id).hidden = true;
  tell(text);
  at("token").focus();
}

async function begin() {
  rubric = await call("GET", "rubric");
  sessionStorage.setItem("token", token);
  at("sign-in").hidden = true;
  at("scale").textContent = `From ${rubric.low} (poor) to ${rubric.high} (excellent)`;
  at("ratings").replaceChildren(...rubric.principles.map(ratingRow));
  await following();
}

function ratingRow(principle) {
  const row = document.createElement("tr");
  const name = document.createElement("th");
  const guidance = document.createElement("small");
  name.scope = "row";
  guidance.textContent = principle.guidance;
  name.append(principle.name, guidance);
  row.append(name, ...["left", "right"].map((side) => ratingCell(principle, side)));
  return row;
}

function ratingCell(principle, side) {
  const cell = document.createElement("td");
  const select = document.createElement("select");
  select.dataset.side = side;
  select.dataset.key = principle.key;
  select.setAttribute("aria-label", `${principle.name}, ${side} response`);
  select.append(new Option("–", ""));
  for (let n = rubric.low; n <= rubric.high; n++) select.append(new Option(n, n));
  cell.append(select);
  return cell;
}

async function following() {
  show(await call("GET", "next"));
  await counts();
}

async function counts() {
  const now = await call("GET", "progress");
  at("progress").textContent = `${now.answered} answered by you, ${now.left} left for you; ` +
    `${now.given} of ${now.wanted} answers are in`;
  at("undo").hidden = now.answered + now.skipped === 0;
  const { all, last } = await call("GET", "agreement");
  at("agreement").textContent = all.compared
    ? `Others said the same as you in ${percent(last.agree)} of your last answers that they gave too, ` +
      `${percent(all.agree)} of all ${all.compared}.`
    : "";
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

function show(next) {
  question = next;
  at("question").hidden = !next;
  at("nothing").hidden = Boolean(next);
  if (!next) return;
  at("conversation").replaceChildren(...next.messages.map(turn));
  at("left").textContent = next.left;
  at("right").textContent = next.right;
  at("note").value = "";
  for (const select of document.querySelectorAll("#ratings select")) select.value = "";
  window.scrollTo(0, 0);
  at("conversation-heading").focus({ preventScroll: true });
}

function turn(message) {
  const box = document.createElement("div");
  const who = document.createElement("b");
  const text = document.createElement("p");
  box.className = "turn";
  text.className = "text";
  who.textContent = message.role === "user" ? rubric.speaker : message.role;
  text.textContent = message.content;
  box.append(who, text);
  return box;
}

async function answer(choice) {
  if (!question) return;
  const ratings = {};
  for (const { value, dataset } of document.querySelectorAll("#ratings select")) {
    if (value) (ratings[dataset.side] ??= {})[dataset.key] = Number(value);
  }
  await call("POST", "answer", { question_id: question.question_id, choice, ratings, note: at("note").value });
  await following();
}

async function undo() {
  show(await call("POST", "undo"));
  await counts();
}

at("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value.trim();
  at("token").value = "";
  alone(begin);
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => alone(() => answer(button.dataset.choice)));
}
at("undo").addEventListener("click", () => alone(undo));
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea");
  if (typing || event.repeat || event.ctrlKey || event.altKey || event.metaKey || !rubric) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (KEYS[key] && question) {
    event.preventDefault();
    alone(() => answer(KEYS[key]));
  } else if (key === "u" && !at("undo").hidden) {
    alone(undo);
  }
});
setInterval(() => {
  if (token && rubric && !question && at("sign-in").hidden) alone(following);
}, LOOK_AGAIN_MS);

if (token) alone(begin);
else signIn("");
