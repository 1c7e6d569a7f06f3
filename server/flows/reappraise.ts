import type { DeviceId, GroupId } from '@fleetkey/protocol/ids.ts'
import type { Caller } from '../access/caller.ts'
import { recordedState } from '../attestation/claims.ts'
import { hasIdentity, isMeasured, type GroupPolicy, type IdentifiedDevice, type Release } from '../fleet/device.ts'
import { strictestPolicy } from '../fleet/policy.ts'
import { ask } from './ask.ts'
import { passing, type Context, type Setting } from './context.ts'
import { convergeDevice } from './converge.ts'
import { lacksList } from './measured.ts'
import { memberPages } from './membership.ts'
import { perform, type Transaction } from './perform.ts'
import { carryOut, quarantine, released } from './quarantine.ts'
import { findAll, inChunks, rowPages } from './rows.ts'
import { inTurn, othersFirst } from './turn.ts'
import { acceptedWith, judgementOf, unmeasuredJudgement, type Judgement } from './verdict.ts'

/** Whose verdicts a change may turn. */
export type Scope = { readonly model: string } | { readonly group: GroupId } | { readonly devices: readonly DeviceId[] }

/** What would be if the store said otherwise: a policy of one group, a release of one model. */
export interface WhatIf {
  readonly policy?: { readonly group: GroupId; readonly policy: GroupPolicy }
  readonly release?: Release
}

/** What a change does to the devices of its scope, judged by what they proved last. */
export interface Impact {
  /** Devices that were judged. */
  readonly judged: number
  readonly quarantines: number
  /** The first of them by id, with the reason. */
  readonly first: readonly { readonly device: DeviceId; readonly reason: string }[]
}

const system: Caller = { kind: 'system', id: 'appraisal', from: 'server' }
const shown = 20
const atOnce = 64
/** Measurement lists that are asked for in one go. */
const listsAtOnce = 64

/** The devices of a scope in order of id, a page at a time, each as it stands when its page is read. */
const devicePages = async function* (ctx: Context, scope: Scope): AsyncGenerator<readonly IdentifiedDevice[], void> {
  if ('model' in scope) {
    for await (const devices of rowPages(ctx.store, 'device'))
      yield devices.filter(hasIdentity).filter(({ model, state }) => model === scope.model && (state === 'enrolled' || state === 'quarantined'))
    return
  }
  const pages = 'group' in scope ? memberPages(ctx, [scope.group]) : idPages(scope.devices)
  for await (const ids of pages) yield (await Promise.all(ids.map(async (id) => await ctx.store.get('device', id, passing)))).filter(hasIdentity)
}

const idPages = async function* (devices: readonly DeviceId[]): AsyncGenerator<readonly DeviceId[], void> {
  const ordered = devices.toSorted()
  for (let start = 0; start < ordered.length; start += atOnce) {
    if (start > 0) await othersFirst()
    yield ordered.slice(start, start + atOnce)
  }
}

/** Reads releases and policies, each once. */
const surroundings = (ctx: Context, whatIf: WhatIf) => {
  const releases = new Map<string, Promise<readonly Release[]>>()
  const policies = new Map<string, Promise<GroupPolicy | undefined>>()
  const { release, policy } = whatIf
  const policyOfGroup = async (id: GroupId): Promise<GroupPolicy | undefined> =>
    id === policy?.group ? policy.policy : (await ctx.store.get('group', id))?.policy
  return {
    async releasesOf(model: string): Promise<readonly Release[]> {
      const known = releases.get(model) ?? findAll(ctx.store, 'release', { where: { model } })
      releases.set(model, known)
      return release?.model !== model ? await known : [...(await known).filter(({ id }) => id !== release.id), release]
    },
    async policyOf(device: DeviceId): Promise<GroupPolicy> {
      const found = await Promise.all(
        (await findAll(ctx.store, 'member', { where: { device } })).map(async ({ group }) => {
          const known = policies.get(group) ?? policyOfGroup(group)
          policies.set(group, known)
          return await known
        }),
      )
      return strictestPolicy(found.filter((one) => one !== undefined))
    },
  }
}

interface Reappraised {
  readonly device: IdentifiedDevice
  readonly judgement: Judgement
  /** Policy wants a measurement list that its verdict does not rest on. */
  readonly unmeasured: boolean
}

/** Every device of the scope that has claims on record, or never measures any, with the verdict that this leads to now; a page at a time. */
const appraisals = async function* (ctx: Context, scope: Scope, whatIf: WhatIf): AsyncGenerator<readonly Reappraised[], void> {
  const { releasesOf, policyOf } = surroundings(ctx, whatIf)
  const judged = async (device: IdentifiedDevice): Promise<Reappraised[]> => {
    if (!isMeasured(device)) {
      const { at, claims } = device.verdict
      return [{ device, judgement: unmeasuredJudgement({ policy: await policyOf(device.id), at, claims }), unmeasured: false }]
    }
    const state = recordedState(device.verdict.claims)
    if (state === undefined) return []
    const [releases, policy] = await Promise.all([releasesOf(device.model), policyOf(device.id)])
    return [{ device, judgement: judgementOf(device, state, { releases, policy, at: device.verdict.at }), unmeasured: lacksList(device, policy) }]
  }
  for await (const devices of devicePages(ctx, scope)) yield (await Promise.all(devices.map(judged))).flat()
}

const isTurned = ({ device, judgement }: Reappraised): boolean => device.state === 'enrolled' && judgement.verdict.verdict === 'contraindicated'

const none: Impact = { judged: 0, quarantines: 0, first: [] }

/** With a further page, whose devices come behind those before. */
const withPage = ({ judged, quarantines, first }: Impact, page: readonly Reappraised[]): Impact => {
  const turned = page.filter(isTurned)
  const more = turned.slice(0, shown - first.length).map(({ device, judgement }) => ({ device: device.id, reason: judgement.verdict.reason }))
  return { judged: judged + page.length, quarantines: quarantines + turned.length, first: [...first, ...more] }
}

/** How many devices a change would quarantine, and which first. Changes nothing. */
export const preview = async (ctx: Context, scope: Scope, whatIf: WhatIf): Promise<Impact> => {
  let impact = none
  for await (const page of appraisals(ctx, scope, whatIf)) impact = withPage(impact, page)
  return impact
}

/**
 * Judges the devices of a scope anew by what they proved last: those that are no longer acceptable are quarantined at once; those that may be again are asked
 * for a fresh quote when they are connected (nothing else brings them back), as are those that now need a measurement list. A device that has nothing to quote
 * with was quarantined by policy alone, and comes back by policy. Harmless to repeat.
 */
export const reappraise = async (ctx: Context, scope: Scope, because: string): Promise<Impact> => {
  let [impact, lists] = [none, 0]
  for await (const page of appraisals(ctx, scope, {})) {
    impact = withPage(impact, page)
    await inChunks(page.filter(isTurned), atOnce, async ({ device, judgement }) => await turn(ctx, device.id, judgement, because))
    const acceptable = page.filter(({ judgement }) => judgement.verdict.verdict !== 'contraindicated')
    const hopeful = acceptable.filter(({ device }) => device.state === 'quarantined')
    // Whole lists are large: the others are asked when they next report, and not all in the same second.
    const measuring = acceptable.filter(({ device, unmeasured }) => unmeasured && ctx.bus.online(device.id)).slice(0, listsAtOnce - lists)
    lists += measuring.length
    await inChunks([...hopeful, ...measuring], atOnce, async ({ device, judgement }) =>
      isMeasured(device) ? await ask(ctx, device.id) : await readmit(ctx, device.id, judgement, because),
    )
  }
  return impact
}

const turn = async (ctx: Context, id: DeviceId, judgement: Judgement, because: string): Promise<void> => {
  const consequence = await inTurn(
    ctx.store,
    `device/${id}`,
    async () =>
      await perform(ctx, { caller: system, action: 'device.quarantine', subject: id, detail: because }, async (tx) => {
        const row = await ctx.store.get('device', id)
        // It has proven something else meanwhile, under the rules that hold now.
        if (row?.state !== 'enrolled' || row.verdict.at !== judgement.verdict.at) return undefined
        return await quarantine(ctx, tx, row, judgement.verdict)
      }),
  )
  // A crash here: it is quarantined; the marker of the change has the others judged after the restart.
  ctx.step('attest.quarantined')
  if (consequence !== undefined) await carryOut(ctx, consequence)
}

/** A device without a TPM that its policy takes again. */
const readmit = async (ctx: Context, id: DeviceId, judgement: Judgement, because: string): Promise<void> => {
  await inTurn(
    ctx.store,
    `device/${id}`,
    async () =>
      await perform(ctx, { caller: system, action: 'device.quarantine', subject: id, detail: because }, async (tx) => {
        const row = await ctx.store.get('device', id)
        if (row?.state !== 'quarantined' || row.verdict.at !== judgement.verdict.at) return
        tx.update('device', { ...released(row), ...acceptedWith(row.floor, judgement) })
        tx.note('no longer quarantined')
      }),
  )
  // A crash here: it is back; what it lacks it gets with its next report.
  ctx.step('attest.accepted')
  await convergeDevice(ctx, id)
}

export const owedAppraisal = 'owed-appraisal/'

interface Owed {
  readonly scope: { readonly model: string } | { readonly group: GroupId }
  readonly because: string
}

/** Adds to a commit that changes what is acceptable: the devices of this scope are to be judged anew, also after a crash. `name` is unique per change. */
export const oweAppraisal = (tx: Transaction, name: string, owed: Owed): void =>
  tx.insert('setting', { id: `${owedAppraisal}${name}`, value: new TextEncoder().encode(JSON.stringify(owed)) })

const read = (setting: Setting): Owed => JSON.parse(new TextDecoder().decode(setting.value)) as Owed

/** Pays what `oweAppraisal` owed. `only`: the devices that can be concerned, when that is fewer than the whole scope. */
export const settleAppraisal = async (ctx: Context, name: string, only?: readonly DeviceId[]): Promise<Impact> =>
  await inTurn(ctx.store, `owed/${name}`, async () => {
    const setting = await ctx.store.get('setting', `${owedAppraisal}${name}`)
    if (setting === undefined) return none
    const { scope, because } = read(setting)
    const impact = await reappraise(ctx, only === undefined ? scope : { devices: only }, because)
    const detail = `${because}: ${impact.quarantines} of ${impact.judged} devices quarantined`
    await perform(ctx, { caller: system, action: 'appraisal.settle', subject: name, detail }, async (tx) => {
      const now = await ctx.store.get('setting', setting.id)
      if (now !== undefined) tx.remove('setting', now)
    })
    ctx.step('appraisal.settled')
    return impact
  })

/** Start-up sweep: judges what a crash left to be judged. */
export const settleOwedAppraisals = async (ctx: Context): Promise<void> => {
  for (const { id } of await findAll(ctx.store, 'setting', { prefix: owedAppraisal })) await settleAppraisal(ctx, id.slice(owedAppraisal.length))
}
