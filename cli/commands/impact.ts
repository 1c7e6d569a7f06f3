import type { ResponseOf } from '@fleetkey/protocol/admin.ts'

type Impact = ResponseOf<'release.withdraw'>

/** `12 of 400 devices would be quarantined: gw-1 (release.withdrawn), …`; `verb` is what is said of them. */
export const impactText = ({ judged, quarantines, first }: Impact, verb: string): string => {
  const named = first.map(({ device, reason }) => `${device} (${reason})`).join(', ')
  const more = quarantines > first.length ? `, and ${quarantines - first.length} more` : ''
  return `${quarantines} of ${judged} devices ${verb}${named === '' ? '' : `: ${named}${more}`}`
}
