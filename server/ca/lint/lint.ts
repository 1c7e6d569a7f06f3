import { Problem } from '@fleetkey/protocol/problem.ts'
import { encodingRules } from './encoding.ts'
import { extensionRules } from './extensions.ts'
import type { Rule } from './rule.ts'
import { keyRules, subjectRules, validityRules } from './subject.ts'
import { viewOf, type ToBeSigned } from './view.ts'

export type { ToBeSigned }

/** What cannot be taken apart has no other fault worth naming; what can holds this. */
const structure = { source: 'RFC 5280 §4.1', says: 'a TBSCertificate', holds: () => true } as const satisfies Rule

/** Every rule, by its name. docs/pki.md is written from it. */
export const lintRules = { 'tbs.structure': structure, ...encodingRules, ...validityRules, ...subjectRules, ...keyRules, ...extensionRules }
export type LintRule = keyof typeof lintRules

const rules = Object.entries<Rule>(lintRules) as readonly (readonly [LintRule, Rule])[]

/** Names of the rules that what is about to be signed breaks. */
export const lint = (given: ToBeSigned): readonly LintRule[] => {
  const view = viewOf(given)
  if (view === undefined) return ['tbs.structure']
  return rules.flatMap(([name, { holds }]) => (holds(view) ? [] : [name]))
}

/** Refuses to have this signed when it breaks a rule: Problem('internal') with the reason `lint.RULE` of the first one. */
export const requireClean = (given: ToBeSigned): void => {
  const broken = lint(given)
  const [first] = broken
  if (first === undefined) return
  const says = broken.map((name) => `${name} (${lintRules[name].says})`).join(', ')
  throw new Problem('internal', `${given.order.profile} ${given.of.serial} breaks ${says}`, { reason: `lint.${first}` })
}

const cell = (text: string): string => text.replaceAll('|', '\\|')

/** The rules as docs/pki.md has them. */
export const lintMarkdown = (): string =>
  ['| rule | must hold | source |', '|---|---|---|', ...rules.map(([name, { says, source }]) => `| \`lint.${name}\` | ${cell(says)} | ${cell(source)} |`)].join(
    '\n',
  )
