// What the pages share: the key, requests to this server and to no other, one thing at a time, keys of the keyboard.
const TOKEN = "token";
const KEYS_OFF = "single-keys-off";
const TRY_AGAIN_MS = 3000;

export const at = (id) => document.getElementById(id);

let token = sessionStorage.getItem(TOKEN) || "";
let busy = false;

export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

// The reply itself, for those that are read piece by piece; Refused where there is none or it is an error.
export async function reply(method, path, body) {
  const headers = { Authorization: `Bearer ${token}` };
  if (body) headers["Content-Type"] = "application/json";
  let got;
  try {
    got = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  } catch {
    throw new Refused(0, "The server does not answer. Nothing is lost: try again in a moment.");
  }
  if (got.ok) return got;
  const said = await got.json().catch(() => ({}));
  const why = said.error?.message ?? said.detail;
  throw new Refused(got.status, typeof why === "string" ? why : "This was refused.");
}

export async function call(method, path, body) {
  const got = await reply(method, path, body);
  return got.status === 204 ? null : got.json();
}

export function tell(text) {
  at("message").textContent = text;
  at("message").hidden = !text;
}

// Live regions are read out when they are written to, though it be the same words.
export function announce(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}

// One thing at a time: a key that is held down must not answer the next question as well. Buttons are marked, not
// disabled, which would take the focus away from whoever works by keyboard.
export async function alone(work, failed = async () => {}) {
  if (busy) return;
  mark(true);
  try {
    tell("");
    await work();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) signOut(token ? "This key is not known here." : "");
    else if (error.status === 403) signOut("This key is not for this page.");
    else {
      tell(error.message);
      await failed(error);
    }
  } finally {
    mark(false);
  }
}

function mark(working) {
  busy = working;
  for (const button of document.querySelectorAll("button")) button.setAttribute("aria-disabled", working);
}

export function signedIn() {
  at("token").value = "";
  sessionStorage.setItem(TOKEN, token);
  at("sign-in").hidden = true;
  at("work").hidden = false;
}

export function signOut(text) {
  token = "";
  sessionStorage.removeItem(TOKEN);
  at("sign-in").hidden = false;
  at("work").hidden = true;
  tell(text);
  at("token").value = "";
  at("token").focus();
}

// Begins with the key that this tab holds, or asks for one.
export function start(begin) {
  at("sign-in").addEventListener("submit", (event) => {
    event.preventDefault();
    token = at("token").value.trim();
    alone(begin);
  });
  // A tab that is opened again while the server is down begins as soon as it is back.
  const again = async () => setTimeout(() => {
    if (at("work").hidden && at("sign-in").hidden) alone(begin, again);
  }, TRY_AGAIN_MS);
  if (token) alone(begin, again);
  else signOut("");
}

// Single keys do what `pressed` says, unless somebody types or has switched them off; WCAG 2.1.4.
export function singleKeys(pressed) {
  const keysOff = at("keys-off");
  keysOff.checked = localStorage.getItem(KEYS_OFF) === "yes";
  const apply = () => {
    localStorage.setItem(KEYS_OFF, keysOff.checked ? "yes" : "no");
    document.body.classList.toggle("keys-off", keysOff.checked);
    for (const button of document.querySelectorAll("button[data-keys]")) {
      if (keysOff.checked) button.removeAttribute("aria-keyshortcuts");
      else button.setAttribute("aria-keyshortcuts", button.dataset.keys);
    }
  };
  keysOff.addEventListener("change", apply);
  apply();
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea");
    if (keysOff.checked || typing || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
    if (!at("work").hidden && pressed(event.key.length === 1 ? event.key.toLowerCase() : event.key)) {
      event.preventDefault();
    }
  });
}

export function make(name, text = "", properties = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  return Object.assign(made, properties);
}

export function turn(who, content) {
  const box = make("div", "", { className: "border-start border-4 ps-3 mb-3" });
  box.append(
    make("div", who, { className: "small fw-semibold text-body-secondary" }),
    make("p", content, { className: "text mb-0" }),
  );
  return box;
}
