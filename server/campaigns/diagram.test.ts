import { readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { transitions } from './campaign.ts'

test('docs/campaigns.md draws the transitions that there are', () => {
  const text = readFileSync(new URL('../../docs/campaigns.md', import.meta.url), 'utf8')
  const diagram = /```mermaid\n(.*?)```/s.exec(text)?.[1] ?? ''
  const drawn = [...diagram.matchAll(/^ +(\S+) --> (\S+)/gm)].map(([, from, to]) => `${from} ${to}`)
  const real = Object.entries(transitions).flatMap(([from, to]) => (to.length === 0 ? [`${from} [*]`] : to.map((one) => `${from} ${one}`)))
  expect(drawn.toSorted()).toEqual(['[*] preparing', ...real].toSorted())
})
