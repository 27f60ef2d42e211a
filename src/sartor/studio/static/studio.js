/* What pages do beside their links and forms. Each of them works without it. */
"use strict";

/* The server sends the changing part of a page as HTML; it escapes what it shows. */
function follow(element) {
  const source = new EventSource(element.dataset.events);
  source.onmessage = (event) => {
    const log = element.querySelector(".log");
    const isAtEnd = !log || log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    const place = log ? log.scrollTop : 0;
    element.innerHTML = event.data;
    const renewed = element.querySelector(".log");
    if (renewed) renewed.scrollTop = isAtEnd ? renewed.scrollHeight : place;
  };
  source.addEventListener("end", () => {
    source.close();
    window.location.reload();
  });
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("[data-events]").forEach(follow);
  document.querySelectorAll(".log").forEach((log) => { log.scrollTop = log.scrollHeight; });
});

/* A key goes to the field or presses the button that names it; Ctrl+Enter sends a question. */
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, select");
  if (!isTyping && !event.ctrlKey && !event.metaKey && !event.altKey && /^[a-z/]$/.test(event.key)) {
    const named = document.querySelector(`[data-key="${event.key}"]`);
    if (named) {
      event.preventDefault();
      if (named.matches("input, textarea")) named.focus(); else named.click();
    }
  }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("[data-send]")) {
    event.preventDefault();
    event.target.form.requestSubmit(document.getElementById(event.target.dataset.send));
  }
});

/* A file that is dropped on the form is chosen by it. */
document.addEventListener("dragover", (event) => {
  if (event.target.closest(".drop")) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  const form = event.target.closest(".drop");
  const field = form && form.querySelector("input[type=file]");
  if (field && event.dataTransfer.files.length) {
    event.preventDefault();
    field.files = event.dataTransfer.files;
  }
});

/* A file above the limit is named before it is sent. */
document.addEventListener("change", (event) => {
  const field = event.target;
  if (!field.matches("input[type=file][data-max-bytes]")) return;
  const isTooLarge = field.files.length && field.files[0].size > Number(field.dataset.maxBytes);
  field.setCustomValidity(isTooLarge ? field.dataset.tooLarge : "");
  field.reportValidity();
});
