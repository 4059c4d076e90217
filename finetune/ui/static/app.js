// Parts of the page that follow the server. Every element with data-poll is fetched again and again, and replaced when
// the server has something new (204: nothing). Without JavaScript, pages work by reloading them.
"use strict";

const EVERY = 2000; // milliseconds
const offline = document.getElementById("offline");

async function poll(element) {
  if (document.hidden) return element;
  const address = new URL(element.dataset.poll, location.href);
  if (element.dataset.version) address.searchParams.set("version", element.dataset.version);
  const answer = await fetch(address, { headers: { "x-fragment": "1" } });
  offline.hidden = true;
  if (answer.status !== 200) return element;
  const made = new DOMParser().parseFromString(await answer.text(), "text/html").body.firstElementChild;
  if (!made || element.contains(document.activeElement)) return element;
  const scrolled = [...element.querySelectorAll(".strip")].map((part) => part.scrollLeft);
  const opened = [...element.querySelectorAll("details")].map((part) => part.open);
  element.replaceWith(made);
  made.querySelectorAll(".strip").forEach((part, number) => { part.scrollLeft = scrolled[number] || 0; });
  if (opened.length) made.querySelectorAll("details").forEach((part, number) => { part.open = opened[number] ?? part.open; });
  return made;
}

async function follow(element) {
  while (element.isConnected && element.dataset.poll) {
    await new Promise((done) => setTimeout(done, EVERY));
    try {
      element = await poll(element);
    } catch {
      offline.hidden = false;
    }
  }
}

document.querySelectorAll("[data-poll]").forEach(follow);

// Forms with data-into are sent without leaving the page; the answer replaces the element with that id.
document.addEventListener("submit", async (event) => {
  const form = event.target.closest("form[data-into]");
  if (!form) return;
  event.preventDefault();
  const fields = new URLSearchParams(new FormData(form));
  fields.set("fragment", "1");
  const answer = await fetch(form.action, { method: "POST", body: fields, headers: { "x-fragment": "1" } });
  const made = new DOMParser().parseFromString(await answer.text(), "text/html").body.firstElementChild;
  if (answer.ok) document.getElementById(form.dataset.into).replaceWith(made);
  else form.after(made);
});
document.addEventListener("input", (event) => event.target.closest("form[data-into]")?.classList.add("changed"));

// The sliders of checkpoints and strengths: every image knows the addresses of all its cells.
document.addEventListener("input", (event) => {
  const box = event.target.closest(".sliders");
  if (!box) return;
  const chosen = [...box.querySelectorAll("input[type=range]")].map((input) => input.dataset.values.split(" ")[input.value]);
  box.querySelectorAll("output").forEach((output, number) => {
    output.textContent = number ? chosen[number] : "step " + Number(chosen[number]).toLocaleString("en");
  });
  box.querySelectorAll("img").forEach((image) => { image.src = JSON.parse(image.dataset.cells)[chosen.join(" ")]; });
});
