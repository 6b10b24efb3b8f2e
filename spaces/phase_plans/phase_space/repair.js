// What gradio's own parts lack for keyboards and screen readers: names of icon buttons, and thoughts that are one button with a state, not two.
(() => {
  const name = (element, text) => element.getAttribute('aria-label') || (element.setAttribute('aria-label', text), element.title = text);
  const repair = () => {
    for (const button of document.querySelectorAll('.submit-button')) name(button, 'Send');
    for (const button of document.querySelectorAll('.stop-button')) name(button, 'Stop');
    for (const title of document.querySelectorAll('.thought-group > .title[role=button]')) {
      title.setAttribute('aria-expanded', title.classList.contains('expanded'));
      for (const button of title.querySelectorAll('button')) { // style.css lets presses through to the title
        button.disabled = true;
        button.parentElement.setAttribute('aria-hidden', 'true');
      }
    }
  };
  let waiting = false;
  const soon = () => waiting || (waiting = true, requestAnimationFrame(() => { waiting = false; repair(); }));
  const what = {childList: true, subtree: true, attributes: true, attributeFilter: ['class']};
  new MutationObserver(soon).observe(document.documentElement, what);
  document.addEventListener('keydown', event => { // Enter opens a thought by itself
    if (event.key !== ' ' || !event.target.matches('.thought-group > .title')) return;
    event.preventDefault();
    event.target.click();
  });
})();
