import type { Examination } from './examine.ts'

/** What a certificate or a file says must not steer the terminal. */
const printable = (value: string): string => value.replaceAll(/[\p{Cc}\p{Cf}\u2028\u2029]/gu, '\uFFFD')

/** Lines of at most `width` characters, all after the first indented. */
const wrapped = (text: string, indent: number, width: number): string => {
  const lines: string[] = []
  let line = ''
  for (const word of printable(text).split(' ')) {
    if (line !== '' && line.length + 1 + word.length > width - indent) {
      lines.push(line)
      line = word
    } else line = line === '' ? word : `${line} ${word}`
  }
  return [...lines, line].join(`\n${' '.repeat(indent)}`)
}

/** For a person at a terminal of `width` columns. */
export const examinationText = (of: Examination, width: number): string => {
  const name = Math.max(...of.findings.map(({ check }) => check.length))
  const indent = 6 + name + 2
  const findings = of.findings.flatMap(({ check, grade, found, remedy }) => [
    `${(grade === 'ok' ? 'ok' : grade.toUpperCase()).padEnd(6)}${check.padEnd(name + 2)}${wrapped(found, indent, width)}`,
    ...(remedy === '' ? [] : [`${' '.repeat(indent - 2)}> ${wrapped(remedy, indent, width)}`]),
  ])
  const board = of.board.model === null ? 'this machine' : of.board.model
  const protection = of.protections.map(
    ({ threat, protected: how, text }) =>
      `  ${how === 'yes' ? 'protected' : how === 'no' ? 'NOT' : 'partly'}`.padEnd(13) + wrapped(`${threat}: ${text}`, 13, width),
  )
  return [
    ...findings,
    ...(protection.length === 0 ? [] : ['', printable(`What the TPM protects on ${board}, against somebody who has it in his hands:`), ...protection]),
    '',
    of.ready ? 'the agent can run here' : 'NOT READY: see FAIL above',
  ].join('\n')
}
