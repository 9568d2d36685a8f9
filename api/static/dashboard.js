// Live refresh and the confirm dialog. Without JavaScript every page still shows its state, and the link
// that opens the dialog leads to the same form as a page of its own.
"use strict";

const isPolled = (element) => (element.getAttribute("hx-trigger") || "").startsWith("every");
const lastReplies = new Map();

document.addEventListener("htmx:beforeRequest", (event) => {
  if (document.hidden && isPolled(event.detail.elt)) {
    event.preventDefault();
  }
});

// An unchanged reply is not swapped in: scroll positions and text selections stay.
document.addEventListener("htmx:beforeSwap", (event) => {
  const { target, serverResponse, xhr } = event.detail;
  if (!isPolled(target) || xhr.status !== 200) {
    return;
  }
  if (lastReplies.get(target.id) === serverResponse) {
    event.detail.shouldSwap = false;
  } else {
    lastReplies.set(target.id, serverResponse);
  }
});

document.addEventListener("htmx:afterSwap", (event) => {
  const dialog = event.detail.target;
  if (dialog instanceof HTMLDialogElement && !dialog.open) {
    dialog.showModal();
  }
});

const setOffline = (offline) => {
  document.getElementById("offline").hidden = !offline;
};
document.addEventListener("htmx:sendError", () => setOffline(true));
document.addEventListener("htmx:responseError", () => setOffline(true));
document.addEventListener("htmx:afterOnLoad", (event) => {
  if (event.detail.successful !== false) {
    setOffline(false);
  }
});

document.addEventListener("click", (event) => {
  const cancel = event.target.closest("[data-close]");
  const dialog = cancel && cancel.closest("dialog");
  if (dialog) {
    event.preventDefault();
    dialog.close();
  }
});

// A rollback waits until the version answers: the button says so, and a second press does nothing.
document.addEventListener("submit", (event) => {
  const button = event.submitter;
  if (button && button.dataset.busy) {
    button.disabled = true;
    button.textContent = button.dataset.busy;
  }
});
