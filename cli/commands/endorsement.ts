import { EndorsementPolicyView } from '@fleetkey/protocol/admin.ts'
import type { z } from 'zod'
import { exit, readInput, text, UsageError, type Command, type Invocation } from '../command.ts'
import { facts, table, when } from '../output.ts'
import { everyPage } from './paging.ts'

type Policy = z.output<typeof EndorsementPolicyView>

/** Certificates, CRLs or both; another kind of file is told apart here, before it is sent anywhere. */
const bundle = (path: string): string => {
  const content = readInput(path).toString('utf8')
  if (!/-----BEGIN (CERTIFICATE|X509 CRL)-----/.test(content)) throw new UsageError(`${path}: no PEM file with a CERTIFICATE or X509 CRL`)
  return content
}

/** A JSON file with these parts of the endorsement policy. */
const policyPart = (call: Invocation, option: string, parts: readonly (keyof Policy)[]): Partial<Policy> => {
  const path = text(call, option)
  if (path === undefined) return {}
  let value: unknown
  try {
    value = JSON.parse(readInput(path).toString('utf8'))
  } catch (error) {
    throw error instanceof UsageError ? error : new UsageError(`--${option} ${path}: not JSON`)
  }
  const read = EndorsementPolicyView.partial().safeParse(value)
  if (!read.success) throw new UsageError(`--${option} ${path}: ${read.error.issues[0]?.path.join('.') ?? ''}: ${read.error.issues[0]?.message ?? ''}`)
  const known = Object.fromEntries(Object.entries(read.data).filter(([key, part]) => part !== undefined && (parts as readonly string[]).includes(key)))
  if (Object.keys(known).length === 0) throw new UsageError(`--${option} ${path}: nothing of ${parts.join(', ')} in it`)
  return known
}

const summary = (policy: Policy): string =>
  facts({
    denied: policy.deny.length,
    floors: policy.floors.map(({ manufacturer, minimum }) => `${manufacturer} ${minimum}`).join(', ') || 'none',
    updates: policy.updates.map(({ from, to }) => `${from} to ${to}`).join(', ') || 'none',
    manufacturers: policy.manufacturers?.join(', ') ?? 'all of the TCG registry',
  })

const listed = async (call: Invocation) => await everyPage((after) => call.client().call('endorsement.list', { query: { after } }))

/** The id that starts so: `endorsement list` shows the first 16 digits. */
const idOf = async (call: Invocation, given: string): Promise<string> => {
  if (/^[0-9a-f]{64}$/.test(given)) return given
  const found = /^[0-9a-f]{8,63}$/.test(given) ? (await listed(call)).filter(({ id }) => id.startsWith(given)) : []
  if (found.length !== 1) throw new UsageError(`${given}: ${found.length === 0 ? 'no endorsement has this id' : `${found.length} endorsements start so`}`)
  return found[0]?.id ?? given
}

export const endorsementCommands: readonly Command[] = [
  {
    name: 'endorsement import',
    usage: '[BUNDLE.pem] [--for ek|idevid] [--test] [--deny FILE.json] [--firmware FILE.json]',
    summary:
      "trust CAs that vouch for EKs, or for the IDevIDs of secure elements, with their CRLs; --test admits a simulator's CA (audited, shown in every report)",
    args: [0, 1],
    options: { for: { type: 'string' }, test: { type: 'boolean', default: false }, deny: { type: 'string' }, firmware: { type: 'string' } },
    async run(call) {
      const [path] = call.args
      const change = { ...policyPart(call, 'deny', ['deny', 'manufacturers']), ...policyPart(call, 'firmware', ['floors', 'updates']) }
      if (path === undefined && Object.keys(change).length === 0) throw new UsageError('a bundle, --deny FILE or --firmware FILE is missing')
      const test = call.options['test'] === true
      const purpose = text(call, 'for') ?? 'ek'
      if (purpose !== 'ek' && purpose !== 'idevid') throw new UsageError(`--for takes ek or idevid, not ${purpose}`)
      const certificate = path === undefined ? undefined : bundle(path)
      const imported = certificate === undefined ? undefined : await call.client().call('endorsement.import', { body: { certificate, test, for: purpose } })
      const policy = Object.keys(change).length === 0 ? undefined : await call.client().call('endorsement.policy.set', { body: change })
      call.out.result({ ...imported, ...(policy === undefined ? {} : { policy }) }, () =>
        [
          ...(imported === undefined
            ? []
            : [
                `endorsement ${imported.id}: ${imported.roots} roots, ${imported.intermediates} intermediates, ${imported.crls} CRLs imported for ${purpose}${test ? ' FOR TESTS: simulated hardware is admitted' : ''}`,
              ]),
          ...(policy === undefined ? [] : [summary(policy)]),
        ].join('\n'),
      )
      return exit.ok
    },
  },
  {
    name: 'endorsement list',
    usage: '',
    summary: 'CAs that vouch for EKs and IDevIDs, and their CRLs',
    args: [0, 0],
    async run(call) {
      const items = await listed(call)
      call.out.result(items, () =>
        table([
          ['ENDORSEMENT', 'FOR', 'KIND', 'SUBJECT', 'CRL UNTIL', 'IMPORTED'],
          ...items.map((row) => [
            row.id.slice(0, 16),
            row.for,
            row.test ? 'TEST' : row.kind === 'root' ? 'maker' : 'intermediate',
            row.subject,
            row.crlUntil === null ? 'none' : when(row.crlUntil),
            when(row.importedAt),
          ]),
        ]),
      )
      return exit.ok
    },
  },
  {
    name: 'endorsement policy',
    usage: '',
    summary: 'deny list, TPM firmware floors and updates, allowed manufacturers',
    args: [0, 0],
    async run(call) {
      const policy = await call.client().call('endorsement.policy.get')
      call.out.result(policy, () => summary(policy))
      return exit.ok
    },
  },
  {
    name: 'endorsement remove',
    usage: 'ID [--yes]',
    summary: 'trust a CA no more; says first how many devices rest on it, and removes with --yes (or when there is none)',
    args: [1, 1],
    options: { yes: { type: 'boolean', default: false } },
    async run(call) {
      const id = await idOf(call, call.args[0] ?? '')
      const { devices } = await call.client().call('endorsement.remove', { params: { id }, query: { dryRun: 'true' } })
      const removed = devices === 0 || call.options['yes'] === true
      if (removed) await call.client().call('endorsement.remove', { params: { id } })
      call.out.result({ id, devices, removed }, () =>
        removed
          ? `endorsement ${id.slice(0, 16)} removed; ${devices} devices rested on it`
          : `${devices} devices rest on endorsement ${id.slice(0, 16)}: their next attestation would be refused. --yes removes it`,
      )
      return removed ? exit.ok : exit.refused
    },
  },
]
